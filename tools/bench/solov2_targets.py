"""Targets of SOLOv2: memory and time an image, ours against mmdet 3.3's and the original port's.

    python tools/bench/solov2_targets.py [--images 2] [--height 800] [--width 1344]

The original zoo's port has fixed shapes by padding: 90 masks of 1344 x 1344 bytes go to the device
with each image. mmdet keeps the masks at full size on the host, copies them to the device as
booleans, and makes targets there in every step: quarter masks for each positive cell. Ours makes
them in the loader: a quarter mask for each object, and lists of cells. ``making`` starts from
masks in the size of the image on both sides, and ends with what the losses read. Before that both
are compared, cell by cell. Ends with exit code 1 if they differ, or if ours take more memory or
time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import solov2_peer as peer
from alternate import alternate, print_table
from scene import draw_scene

if TYPE_CHECKING:
    import torch

PORT_BYTES = 90 * 1344 * 1344  # objects, height and width that the port pads to


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=2, help="images a batch (default 2)")
    parser.add_argument("--height", type=int, default=800, help="pixels (default 800)")
    parser.add_argument("--width", type=int, default=1344, help="pixels (default 1344)")
    parser.add_argument("--objects", type=int, default=8, help="of an image (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=8, help="timed runs of each (default 8)")
    return parser.parse_args()


class Ours:
    """Quarter masks, centres and cells, as the loader makes them; a call gives the seconds."""

    def __init__(self, scenes: list[Any]) -> None:
        from solov2.config import Config

        self.scenes, self.head = scenes, Config().head
        self.masks = [peer.draw_masks(scene) for scene in scenes]

    def __call__(self) -> dict[str, float]:
        from solov2.targets import prepare

        start = time.perf_counter()
        self.detection = peer.to_detection(self.scenes, self.masks)
        self.targets = prepare(self.detection, self.head, static=False)
        return {"making": time.perf_counter() - start}

    def parts(self) -> dict[str, int]:
        """Bytes of an image that go to the device."""
        parts = {
            "masks": self.detection.masks_BQHW,
            "centres": self.detection.centers_BQ2,
            **self.targets._asdict(),
        }
        return {name: bytes_of([part]) // len(self.scenes) for name, part in parts.items()}

    def cells(self, image: int) -> tuple[list[int], Counter[tuple[int, bytes]]]:
        """The classes of all cells, and the mask of each pair of a cell and an object."""
        masks_QHW, targets = self.detection.masks_BQHW[image], self.targets
        pairs = [
            (cell, masks_QHW[slot].numpy().tobytes())
            for cell, slot, valid in zip(
                targets.cells_BP[image].tolist(),
                targets.objects_BP[image].tolist(),
                targets.valid_BP[image].tolist(),
                strict=True,
            )
            if valid
        ]
        return targets.labels_BS[image].tolist(), Counter(pairs)


class Theirs:
    """mmdet's targets, from bitmaps; a call gives the seconds."""

    def __init__(self, scenes: list[Any]) -> None:
        self.head = peer.build_theirs().mask_head
        self.objects = [peer.their_objects(scene) for scene in scenes]
        height, width = scenes[0].size
        self.size = (height // 4, width // 4)

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        self.targets = [
            self.head._get_targets_single(objects, featmap_sizes=self.size)
            for objects in self.objects
        ]
        return {"making": time.perf_counter() - start}

    def parts(self) -> dict[str, int]:
        """Bytes of an image on the device."""
        masks = bytes_of([objects.masks.to_tensor(bool, "cpu") for objects in self.objects])
        parts = {"full-size masks": masks}
        for name, index in (("masks of cells", 0), ("labels", 1), ("positive", 2)):
            parts[name] = bytes_of([each for image in self.targets for each in image[index]])
        return {name: size // len(self.targets) for name, size in parts.items()}

    def cells(self, image: int) -> tuple[list[int], Counter[tuple[int, bytes]]]:
        """The classes of all cells, and the mask of each pair of a cell and an object."""
        masks, grids, _, indices = self.targets[image]
        background, first = self.head.num_classes, 0
        classes: list[int] = []
        pairs: list[tuple[int, bytes]] = []
        for masks_PHW, labels_GG, cells in zip(masks, grids, indices, strict=True):
            classes += [
                -1 if label == background else label for label in labels_GG.flatten().tolist()
            ]
            pairs += [
                (first + int(cell), mask_HW.numpy().tobytes())
                for cell, mask_HW in zip(cells, masks_PHW, strict=True)
            ]
            first += labels_GG.numel()
        return classes, Counter(pairs)


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """What the tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(peer.MODEL_DIR))
    scenes = [
        draw_scene(i, options.height, options.width, options.objects) for i in range(options.images)
    ]
    ours, theirs = Ours(scenes), Theirs(scenes)
    seconds = alternate({"ours": ours, "mmdet": theirs}, rounds=options.rounds)
    images = range(options.images)
    same = all(ours.cells(image) == theirs.cells(image) for image in images)
    pairs = sum(ours.cells(image)[1].total() for image in images)
    print(f"{pairs} pairs of cell and object; the same in both: {same}\n")
    print("bytes an image")
    sizes = {"ours": ours.parts(), "mmdet": theirs.parts(), "port": {"padded masks": PORT_BYTES}}
    for name, parts in sizes.items():
        listed = ", ".join(f"{part} {size:,}" for part, size in parts.items())
        print(f"  {name:<6} {sum(parts.values()) / 1e6:8.2f} MB: {listed}")
    print()
    print_table(seconds, ours="ours", theirs="mmdet")
    both = zip(seconds["ours"]["making"], seconds["mmdet"]["making"], strict=True)
    slower = statistics.median(x / y for x, y in both) > 1
    larger = sum(sizes["ours"].values()) > sum(sizes["mmdet"].values())
    sys.exit(slower or larger or not same)


if __name__ == "__main__":
    main()
