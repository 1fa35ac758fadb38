"""SOLOv2 instance segmentation."""
