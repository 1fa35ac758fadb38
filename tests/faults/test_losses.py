"""Losses that are not finite, spikes, and a loss scale that only falls, in whole runs."""

import re
from pathlib import Path

import pytest
import torch
from harness import ROOT, content_of, differences, records, result_of, run_to_end

PARTS = ["model", "parts", "rank_parts"]


def fault(kind: str, *, rank: int = 0, step: int, steps: int = 1) -> list[str]:
    words = {"kind": kind, "rank": rank, "step": step, "steps": steps}
    return [f"fault.{name}={value}" for name, value in words.items()]


def images(rank: int, step: int) -> str:
    """Names of the points of a rank in a step."""
    return ", ".join(f"point_{step - 1}_{index}" for index in range(4 * rank, 4 * rank + 4))


@pytest.mark.parametrize(
    ("kind", "step", "what"),
    [
        ("nan", 5, r"The loss is not finite \(square=nan\) on rank 1 at step 5"),
        (
            "spike",
            40,
            r"The loss rose to \S+ \(square=\S+\) on rank 1 at step 40, where \S+ is usual",
        ),
    ],
)
def test_a_bad_loss_on_one_rank_ends_all_with_its_words(
    toy: Path, output: Path, kind: str, step: int, what: str
) -> None:
    words = ["train_2p", "--steps=60", f"--save_every={step - 1}", "run.save_in_background=false"]
    done = run_to_end(toy, *words, *fault(kind, rank=1, step=step), output=output)
    assert done.code == 1
    assert re.search(f"{what}; its images are {images(1, step)}: ", done.err), done.err
    assert "Traceback" not in done.err
    assert result_of(output)["status"] == "failed"
    assert content_of(output)["step"] == step - 1, "the last checkpoint is the one before"


@pytest.mark.parametrize(
    "words", [["train_2p"], ["train_1p", "run.save_in_background=false"]], ids=["2p", "1p"]
)
def test_weights_that_are_not_finite_are_never_saved(
    toy: Path, output: Path, words: list[str]
) -> None:
    """The gradients of step 4 are infinite, its loss is not; step 4 would be saved.

    Who saves in the background, or has other ranks, may meet the loss of step 5 first.
    """
    fault_words = fault("overflow", step=4)
    done = run_to_end(toy, *words, "--save_every=2", *fault_words, output=output)
    assert done.code == 1
    written = r"The weights are not finite \(0\.weight\), .* step_00000002\.pth is whole; "
    met = r"The loss is not finite \(square=nan\) on rank \d at step 5"
    assert re.search(written if words[0] == "train_1p" else f"{written}|{met}", done.err)
    assert "Traceback" not in done.err
    assert content_of(output)["step"] == 2


def test_a_bad_step_of_one_rank_is_left_out_on_all(toy: Path, output: Path) -> None:
    words = ["train_2p", "--skip_bad_steps=2", "--save_every=1", "--keep_checkpoints=8"]
    done = run_to_end(toy, *words, *fault("nan", rank=1, step=5), output=output)
    assert done.code == 0, done.err
    before, bad, after = (content_of(output, f"step_{step:08d}.pth") for step in (4, 5, 6))
    assert bad["step"] == 5
    for name in ("model", "parts", "rank_parts"):
        assert not list(differences(before[name], bad[name], name))
    assert list(differences(bad["model"], after["model"], "model")), "the next step is taken"
    said = (output / "train_0.log").read_text()
    assert (
        "left out step 5, number 1 of 2 that may be: The loss is not finite (square=nan) on rank "
        f"1 at step 5; its images are {images(1, 5)}\n"
    ) in said
    assert result_of(output)["bad_steps"] == 1
    lines = records(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 7, 8]
    assert [line["bad_steps"] for line in lines] == [0, 0, 0, 0, 1, 1, 1]


def test_the_count_of_bad_steps_goes_on_after_a_resume(toy: Path, output: Path) -> None:
    words = ["train_1p", "--skip_bad_steps=3"]
    first = run_to_end(toy, *words, "--steps=6", *fault("nan", step=3, steps=2), output=output)
    assert first.code == 0, first.err
    rest = fault("inf", step=8, steps=9)
    done = run_to_end(toy, *words, "--steps=20", "--resume", *rest, output=output)
    assert done.code == 1
    assert re.search(
        r"The loss is not finite \(square=\S+\) on rank 0 at step 9; its images are "
        + images(0, 9)
        + ": 3 such steps were left out already, and --skip_bad_steps allows no more",
        done.err,
    ), done.err


def test_a_loss_scale_that_only_falls_ends_the_run(toy: Path, output: Path) -> None:
    words = ["train_2p", "--steps=60", "--amp=O1", "--dtype=float16"]
    done = run_to_end(toy, *words, *fault("overflow", step=3), output=output)
    assert done.code == 1
    found = re.search(
        r"The loss scale only falls: the gradients of step (\d+) on rank (\d) \(square=\S+; its "
        r"images are (.*?)\) are not finite even at a loss scale of \S+, after 31 skipped steps; ",
        done.err,
    )
    assert found, done.err
    step, rank, named = found.groups()
    assert named == images(int(rank), int(step))
    scales = [line["loss_scale"] for line in records(output)]
    assert scales == sorted(scales, reverse=True) and scales[-1] < 2.0**-10


MODELS = {
    "contrib/cv/classification/Twins-ALTGVT-S": ["evaluate.every=0", "optimizer.ema=0.9"],
    "built-in/cv/detection/Faster_Mask_RCNN_for_PyTorch": ["evaluate.at_end=false"],
    "contrib/cv/detection/SOLOv2": ["evaluate.at_end=false"],
    "built-in/others/DeCLIP_for_PyTorch": ["evaluate.at_end=false"],
    "built-in/others/GLIP_for_PyTorch": ["evaluate.at_end=false", "solver.ema=0.9"],
}


@pytest.mark.thorough
@pytest.mark.parametrize("model", MODELS)
def test_steps_that_are_left_out_leave_no_trace_in_any_model(model: str, scratch: Path) -> None:
    """A checkpoint that says that losses were far below 0 makes each one after it a spike."""
    words = ["train_smoke_2p", "--device=cpu", *MODELS[model]]
    first, last = scratch / "first", scratch / "last"
    done = run_to_end(ROOT / model, *words, "--max_steps=3", output=first, timeout_s=300)
    assert done.code == 0, done.err
    before = content_of(first)
    before["losses"]["recent"] = {"start": -1000.0, "latest": [-1000.0] * 40}
    torch.save(before, scratch / "low.pth")
    words += [f"--resume={scratch / 'low.pth'}", "--skip_bad_steps=2", "run.spike_factor=1"]
    done = run_to_end(ROOT / model, *words, "--max_steps=5", output=last, timeout_s=300)
    assert done.code == 0, done.err
    assert result_of(last)["bad_steps"] == 2
    after = content_of(last)
    assert (before["step"], after["step"]) == (3, 5)
    for name in ("model", "parts", "rank_parts"):
        differing = differences(before[name], after[name], name)
        # The schedule goes on.
        assert not [where for where in differing if not re.search(r"\.lr(:|$)", where)]


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(5))
def test_a_long_run_of_noisy_losses_has_no_spike(toy: Path, output: Path, seed: int) -> None:
    words = ["train_2p", "--steps=3000", "data.save_every=1000", "run.log_every=500"]
    done = run_to_end(toy, *words, f"--seed={seed}", output=output)
    assert done.code == 0, done.err
