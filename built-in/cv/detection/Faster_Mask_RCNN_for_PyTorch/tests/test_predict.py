"""python3 -m rcnn.predict as a user starts it: what it draws, and what it refuses."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from predict_runs import ClosedSetPredictContract, Refusal
from torch import nn

from rcnn import predict
from rcnn.config import CARD_OPTIONS, Config
from rcnn.model import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rcnn_runs import RECIPE

MISSPELT: list[Refusal] = [
    (["mine"], ["roi.nms_tresh=0.4"], "roi.nms_thresh"),
    (["mine"], ["MODEL.RPN.NMS_TRESH", "0.4"], "MODEL.RPN.NMS_THRESH"),
]


class TestPredict(ClosedSetPredictContract):
    program = predict
    schema = Config
    card_options = CARD_OPTIONS
    recipe = RECIPE

    @classmethod
    def build(cls, config: Config) -> nn.Module:
        return build_model(config, len(cls.classes))

    def test_settings_and_names_can_be_given(
        self,
        pictures: Path,
        words: Sequence[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "names.txt").write_text("Katze\nHund\n", encoding="utf-8")
        more = ["--classes=names.txt", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.2"]
        assert predict.main([str(pictures / "clear.png"), *words, *more]) == 0
        found = capsys.readouterr().out
        assert "Katze" in found or "Hund" in found

    def test_a_checkpoint_by_itself_needs_its_recipe(
        self,
        pictures: Path,
        words: Sequence[str],
        output: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        shutil.copy(output / "checkpoints" / "best.pth", tmp_path / "alone.pth")
        more = [str(pictures / "clear.png"), *words, "--checkpoint=alone.pth"]
        assert predict.main(more) == 2
        assert "give the weights and the config that belong together" in capsys.readouterr().err
        assert predict.main([*more, f"--config-file={output}/tiny.yaml"]) == 0
        assert " x class " in capsys.readouterr().out

    @pytest.mark.parametrize("refusal", MISSPELT)
    def test_a_misspelt_setting_is_told_in_a_sentence(
        self, refusal: Refusal, assert_refused: Callable[[Refusal], None]
    ) -> None:
        assert_refused(refusal)
