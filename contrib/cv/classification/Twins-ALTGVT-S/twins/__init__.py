"""Twins: image classification with spatially separable self-attention."""
