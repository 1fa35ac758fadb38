"""python3 -m solov2.predict as a user starts it: what it draws, and what it refuses."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from predict_runs import ClosedSetPredictContract, Refusal, pixels
from torch import nn

from solov2 import predict
from solov2.config import CARD_OPTIONS, Config
from solov2.model import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent))

from solo_runs import RECIPE

WRONG_SETTINGS: list[Refusal] = [
    (["mine"], ["test.update_thresh=0.4"], "test.update_thr"),
    (["mine"], ["test.kernel=lineal"], "test.kernel"),
]
IN_MMDET = {
    "mask_feat_head.conv_pred.0.": "mask_head.mask_feature_head.conv_pred.",
    "mask_feat_head.": "mask_head.mask_feature_head.",
    "bbox_head.cate_convs.": "mask_head.cls_convs.",
    "bbox_head.solo_cate.": "mask_head.conv_cls.",
    "bbox_head.solo_kernel.": "mask_head.conv_kernel.",
    "bbox_head.": "mask_head.",
}
"""How names begin here and in WXinlong/SOLO, and in mmdet 3; the first that fits counts."""


def in_mmdet(name: str) -> str:
    for ours, theirs in IN_MMDET.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


class TestPredict(ClosedSetPredictContract):
    program = predict
    schema = Config
    card_options = CARD_OPTIONS
    recipe = RECIPE
    weights_key = "state_dict"

    @classmethod
    def build(cls, config: Config) -> nn.Module:
        return build_model(config, len(cls.classes))

    def test_boxes_are_drawn_when_asked_for(self, pictures: Path, words: Sequence[str]) -> None:
        given = [str(pictures / "clear.png"), *words]
        assert predict.main(given) == 0
        without = pixels(Path("out/clear.png"))
        assert predict.main([*given, "--boxes"]) == 0
        assert not np.array_equal(pixels(Path("out/clear.png")), without)

    def test_settings_and_names_can_be_given(
        self,
        pictures: Path,
        words: Sequence[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "names.txt").write_text("Katze\nHund\n", encoding="utf-8")
        more = ["--classes=names.txt", "test.max_per_img=1"]
        assert predict.main([str(pictures / "clear.png"), *words, *more]) == 0
        found = capsys.readouterr().out
        assert ": 1 x Katze;" in found or ": 1 x Hund;" in found

    @pytest.mark.parametrize("writer", ["this zoo", "WXinlong/SOLO", "mmdet"])
    def test_a_checkpoint_by_itself_needs_its_recipe(
        self,
        writer: str,
        pictures: Path,
        words: Sequence[str],
        output: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As others publish them; then it draws what it draws beside its settings."""
        given = [str(pictures / "clear.png"), *words]
        (tmp_path / "names.txt").write_text("class 0\nclass 1\n")
        assert predict.main([*given, "--classes=names.txt"]) == 0
        expected = pixels(Path("out/clear.png"))

        best = output / "checkpoints" / "best.pth"
        weights = torch.load(best, weights_only=True)["model"]
        meta = {"epoch": 12, "CLASSES": ("a", "b")}
        if writer == "this zoo":
            shutil.copy(best, "alone.pth")
        elif writer == "WXinlong/SOLO":
            torch.save({"meta": meta, "state_dict": weights}, "alone.pth")
        else:
            named = {in_mmdet(name): value for name, value in weights.items()}
            torch.save({"meta": meta, "state_dict": named}, "alone.pth")
        more = [*given, "--checkpoint=alone.pth"]
        assert predict.main(more) == 2
        assert "give the weights and the config that belong together" in capsys.readouterr().err
        assert predict.main([*more, f"--config-file={output}/tiny.yaml"]) == 0
        assert " x class " in capsys.readouterr().out
        assert np.array_equal(pixels(Path("out/clear.png")), expected)

    @pytest.mark.parametrize("refusal", WRONG_SETTINGS)
    def test_a_wrong_setting_is_told_in_a_sentence(
        self, refusal: Refusal, assert_refused: Callable[[Refusal], None]
    ) -> None:
        assert_refused(refusal)
