"""What COCO or geometry defines: annotations, boxes, masks, operators, batches, evaluation."""
