"""python3 -m glip.predict as a user starts it: what it draws, and what it refuses."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from predict_runs import PredictContract, Refusal, pixels
from torch import nn

from glip import predict
from glip.config import CARD_OPTIONS, Config
from glip.model import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glip_runs import RECIPE

pytestmark = pytest.mark.device

REFUSED: dict[str, Refusal] = {
    "evil .pth": (
        ["mine"],
        ["--checkpoint=evil.pth", "--config=tiny.yaml"],
        "evil.pth was refused",
    ),
    "no BERT": (["mine"], ["model.bert=nowhere"], "nowhere"),
    "misspelt setting": (["mine"], ["test.nms_thresh=0.4"], "test.nms_thr"),
    "no text": (["mine"], ["--text="], "--text is empty"),
    "a phrase twice": (["mine"], ["--text=dog. a cat. Dog"], "'Dog' occurs twice in --text"),
    "a long text": (["mine"], ["--text=" + "dog " * 40 + ". "], "than the 32 of model.max_tokens"),
}


class TestPredict(PredictContract):
    program = predict
    schema = Config
    card_options = CARD_OPTIONS
    recipe = RECIPE
    options = ("--text=a red cup. the Large dog.",)
    labels = ("a red cup", "the Large dog")
    lists_objects = True

    @classmethod
    def build(cls, config: Config) -> nn.Module:
        return build_model(config)

    def test_objects_are_listed_by_score_with_their_boxes(
        self, pictures: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert predict.main([pictures.name, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith("  ")]
        assert len(found) > 20
        scores = [float(line.split()[0]) for line in found[:10]]
        assert scores == sorted(scores, reverse=True)
        for line in found[:10]:
            left, top, right, bottom = map(int, line.rpartition(": ")[2].split())
            assert 0 <= left < right <= 90 and 0 <= top < bottom <= 60, line

    def test_settings_can_be_given_and_words_change_what_is_found(
        self, pictures: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [str(pictures / "clear.png"), *words, "test.max_per_img=1"]
        scores = []
        for text in ("cup. ", "horse. ", "stop sign. "):
            assert predict.main([*given, f"--text={text}"]) == 0
            first, second = capsys.readouterr().out.splitlines()
            assert f": 1 x {text[:-2]}; drawn" in first
            scores.append(second)
        assert len(set(scores)) == 3

    @pytest.mark.parametrize("writer", ["this zoo", "microsoft/GLIP"])
    def test_a_checkpoint_by_itself_needs_its_recipe(
        self,
        writer: str,
        pictures: Path,
        words: Sequence[str],
        output: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As others publish them; then it draws what it draws beside its settings."""
        given = [str(pictures / "clear.png"), *words]
        assert predict.main(given) == 0
        expected = pixels(Path("out/clear.png"))
        best = output / "checkpoints" / "best.pth"
        if writer == "this zoo":
            shutil.copy(best, "alone.pth")
        else:
            weights = torch.load(best, weights_only=True)["model"]
            weights = {f"module.{name}": value for name, value in weights.items()}
            torch.save({"model": weights, "iteration": 9}, "alone.pth")
        more = [*given, "--checkpoint=alone.pth"]
        recipe = f"--config-file={output}/tiny.yaml"
        assert predict.main([*more, recipe, "model.tower_blocks=2"]) == 2
        told = capsys.readouterr().err
        assert "alone.pth" in told and "belongs to other settings" in told
        assert predict.main([*more, recipe]) == 0
        assert np.array_equal(pixels(Path("out/clear.png")), expected)

    @pytest.mark.parametrize("case", REFUSED)
    def test_words_and_weights_that_do_not_fit_are_told_in_a_sentence(
        self, case: str, assert_refused: Callable[[Refusal], None]
    ) -> None:
        assert_refused(REFUSED[case])
