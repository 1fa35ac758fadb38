"""Detections on their way to COCO's results, and the program that scores a checkpoint."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_runs import DEVICE, detections_of, draw_coco, result_of
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from solov2.config import CARD_OPTIONS, Config
from solov2.data import Batch
from solov2.evaluate import to_originals
from solov2.model import Detections, build_model
from zoo_common import checkpoint, device
from zoo_common.config import load_config
from zoo_common.detection.batching import Collate, Entry, StaticShapes
from zoo_common.detection.transforms import Sample

sys.path.insert(0, str(Path(__file__).resolve().parent))

from solo_runs import script, write_recipe

pytestmark = pytest.mark.device

RESIZED = [(64, 90), (50, 128)]
ORIGINAL = [(48, 70), (161, 411)]
COUNTS = [7, 4]
SLOTS = 9


def batch_of(shapes: StaticShapes | None) -> Batch:
    """Two images, the first as high as the extent (64 x 128), the second as wide."""
    nothing = (np.zeros((0, 4)), np.zeros(0, np.int64))
    entries = [
        Entry(Sample(np.zeros((*resized, 3), np.uint8), *nothing), original, 10 + number, "")
        for number, (resized, original) in enumerate(zip(RESIZED, ORIGINAL, strict=True))
    ]
    return Batch(Collate(shapes, divisibility=32, masks=False)(entries, []), None)


def draw(height: int, width: int) -> Tensor:
    """Smooth probabilities (images, slots, height / 4, width / 4)."""
    dice = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, SLOTS, 5, 6, generator=dice)
    return (4 * F.interpolate(coarse, (height // 4, width // 4), mode="bicubic")).sigmoid()


def found_of(masks_BDHW: Tensor) -> Detections:
    valid_BD = torch.arange(SLOTS) < torch.tensor(COUNTS)[:, None]
    scores_BD = torch.where(valid_BD, torch.linspace(0.9, 0.1, SLOTS), 0)
    labels_BD = torch.arange(2 * SLOTS).view(2, SLOTS)
    found = Detections(scores_BD, labels_BD, valid_BD, masks_BDHW, torch.zeros(2, dtype=bool))
    where = device.resolve(DEVICE)
    return Detections(*(tensor.to(where) for tensor in found))


def in_full(masks_DHW: Tensor, image: int, mask_thr: float) -> np.ndarray:
    """WXinlong/SOLO's chain, whole images all the way."""
    height, width = masks_DHW.shape[1:]
    padded = F.interpolate(masks_DHW[None], (4 * height, 4 * width), mode="bilinear")
    cut = padded[..., : RESIZED[image][0], : RESIZED[image][1]]
    return (F.interpolate(cut, ORIGINAL[image], mode="bilinear")[0] > mask_thr).numpy()


@pytest.mark.parametrize("mask_thr", [0.5, 0.8])
@pytest.mark.parametrize("bucket", [None, (96, 160)])
def test_masks_boxes_scores_and_labels_come_in_pixels_of_the_files(
    mask_thr: float, bucket: tuple[int, int] | None
) -> None:
    """What a bucket pads beyond the extent must not be seen at the images' edges."""
    batch = batch_of(None if bucket is None else StaticShapes((bucket,), slots=1))
    inside = draw(64, 128)
    padded = inside if bucket is None else F.pad(inside, (0, 8, 0, 8))
    found = found_of(padded)
    for image, result in enumerate(to_originals(found, batch, mask_thr)):
        count = COUNTS[image]
        assert result.image_id == 10 + image
        assert result.labels_D.tolist() == list(range(SLOTS * image, SLOTS * image + count))
        np.testing.assert_array_equal(result.scores_D, found.scores_BD[image, :count].cpu())
        masks = in_full(inside[image, :count], image, mask_thr)
        assert len(result.rles) == len(result.boxes_D4) == count
        for rle, box_4, mask_HW in zip(result.rles, result.boxes_D4, masks, strict=True):
            np.testing.assert_array_equal(coco_mask.decode(rle), mask_HW)
            rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
            assert box_4.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_a_mask_without_a_pixel_stays_and_an_image_may_have_none() -> None:
    batch = batch_of(None)
    found = found_of(draw(64, 128))
    found.masks_BDHW[0, 2] = 0.4
    found.valid_BD[1] = False
    first, second = to_originals(found, batch)
    assert len(first.rles) == 7
    assert coco_mask.area(first.rles)[2] == 0 and first.boxes_D4[2].tolist() == [0, 0, 0, 0]
    assert second.rles == [] and second.boxes_D4.shape == (0, 4) and len(second.scores_D) == 0


def test_images_with_more_candidates_than_slots_are_told(tmp_path: Path) -> None:
    recipe = f"--config={write_recipe(tmp_path / 'tiny.yaml')}"
    config = load_config(Config, [recipe], CARD_OPTIONS)
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "start.pth", {"model": build_model(config, 2).state_dict()})
    draw_coco(tmp_path / "coco")
    words = [recipe, "--data_path=coco", "--checkpoint=start.pth", "model.static_shapes=on"]
    more = ["test.candidates=3", "--output_dir=out"]
    done = script("train_eval_1p", *words, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out" / "train_0.log").read_text()
    assert "4 of 4 images had more candidates than test.candidates=3" in log
    assert result_of(tmp_path / "out")["metric"]["name"] == "mask_AP"
    assert 0 < len(detections_of(tmp_path / "out")) <= 4 * 3
