"""DeCLIP: data-efficient image-text pre-training."""
