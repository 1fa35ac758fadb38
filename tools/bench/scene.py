"""A scene that detectors are timed on: noise, and objects of many sizes in it.

Shape letters: H W pixels, C channels, N objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo_common.detection.transforms import Sample

OBJECTS = 8  # of an image: COCO has 7.3
CORNERS = 24  # of an outline: COCO has about as many
NUM_CLASSES = 80


def draw_scene(seed: int, height: int, width: int, objects: int = OBJECTS) -> Sample:
    """A noise image with objects of many sizes, whose outlines are uneven ellipses."""
    import numpy as np

    from zoo_common.detection.masks import polygons_to_edges
    from zoo_common.detection.transforms import Sample

    random = np.random.default_rng(seed)
    coarse = random.integers(256, size=(height // 16 + 1, width // 16 + 1, 3))
    image = coarse.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    image = np.clip(image + random.integers(-30, 31, size=image.shape), 0, 255).astype(np.uint8)
    boxes, outlines = [], []
    for _ in range(objects):
        size = np.exp(random.uniform(np.log(24), np.log(min(height, width) * 0.9), size=2))
        center = random.uniform(size / 2, (width, height) - size / 2)
        angle = np.sort(random.uniform(0, 2 * np.pi, size=CORNERS))
        radius = random.uniform(0.7, 1.0, size=CORNERS)
        corners = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] * size / 2
        corners = np.clip(corners + center, 0, (width, height))
        boxes.append([*corners.min(axis=0), *corners.max(axis=0)])
        outlines.append(polygons_to_edges([corners.flatten().tolist()]))
    return Sample(
        image_HWC=image,
        boxes_N4=np.array(boxes).reshape(-1, 4),
        labels_N=random.integers(NUM_CLASSES, size=objects),
        edges=[edges for edges, _ in outlines],
        rings=[rings for _, rings in outlines],
    )
