"""Faster_Mask_RCNN_for_PyTorch."""
