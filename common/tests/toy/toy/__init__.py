"""The smallest model directory: a line fitted to points, with faults on demand."""
