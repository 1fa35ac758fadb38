"""Checkpoints: whole or absent, never code, and clear about what does not fit."""

import argparse
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from zoo_common import checkpoint, device
from zoo_common.errors import TrainingError, UserError

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, classes))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.pth"
    content = {"model": network().state_dict(), "step": 7, "rng": [{"python": [3, [1, 2], None]}]}
    checkpoint.save(path, content)
    loaded = checkpoint.load(path)
    assert loaded["step"] == 7
    assert loaded["rng"] == content["rng"]
    torch.testing.assert_close(loaded["model"], dict(content["model"]), rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"]


@pytest.mark.device
def test_what_a_device_saved_is_read_without_it(tmp_path: Path) -> None:
    """torch.load without map_location, as other tools call it, wants the device of a tensor."""
    path = tmp_path / "last.pth"
    model = network().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, device=DEVICE)).sum().backward()
    optimizer.step()
    weights = model.state_dict()
    weights["tied.weight"] = weights["0.weight"]
    checkpoint.save(path, {"model": weights, "parts": [optimizer.state_dict(), (1, "x")]})
    script = (
        "import sys, torch; read = torch.load(sys.argv[1], weights_only=True); "
        "model, (optimizer, plain) = read['model'], read['parts']; "
        "tensors = [*model.values(), *(v for s in optimizer['state'].values() for v in s.values())]"
        "; assert {t.device.type for t in tensors} == {'cpu'}; assert plain == (1, 'x'); "
        "assert model['tied.weight'].data_ptr() == model['0.weight'].data_ptr(); "
        "assert model._metadata['0'] == {'version': 1}; "
        "print(model['0.weight'].sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(weights["0.weight"].sum().item(), rel=1e-6)
    loaded = checkpoint.load(path)["model"]
    model.load_state_dict({key: loaded[key] for key in model.state_dict()})
    assert all(torch.equal(loaded[key], value.cpu()) for key, value in weights.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "args": argparse.Namespace(lr=1e-3, data_path="/x")},
    ],
)
def test_weights_files_of_other_tools_are_read(wrap, tmp_path: Path) -> None:
    weights = network().state_dict()
    torch.save(wrap({f"module.{key}": value for key, value in weights.items()}), tmp_path / "w.pth")
    assert list(checkpoint.load(tmp_path / "w.pth")["model"]) == list(weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_runner_leaves_beside_the_weights_is_not_read(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMMLab's runner writes its log: objects of its own with arrays and methods inside."""
    built: list[object] = []

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history, self.methods = np.ones(3), {"mean": HistoryBuffer.mean}

        def mean(self) -> None: ...

        def __setstate__(self, state: object) -> None:
            built.append(state)

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    holder = SimpleNamespace(HistoryBuffer=HistoryBuffer)
    for name in ("mmengine", "mmengine.logging", HistoryBuffer.__module__):
        monkeypatch.setitem(sys.modules, name, holder)
    weights = network().state_dict()
    content = {
        "meta": {"CLASSES": ("cat", "dog"), "config": "x = 1", "best": np.float64(0.5)},
        "state_dict": weights,
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    loaded = checkpoint.load(tmp_path / "w.pth")
    assert list(loaded["model"]) == list(weights)
    assert loaded["meta"]["CLASSES"] == ("cat", "dog")
    assert not built
    torch.save({"model": {"w": np.ones(3)}}, tmp_path / "arrays.pth")
    with pytest.raises(UserError, match=r"arrays\.pth was refused: its weights are no tensors"):
        checkpoint.load(tmp_path / "arrays.pth")


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Evil()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name} was refused"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_told(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    checkpoint.save(whole, {"model": network().state_dict()})
    data = whole.read_bytes()
    for name, content in {
        "half.pth": data[: len(data) // 2],
        "empty.pth": b"",
        "text.pth": b"not a checkpoint at all\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save({"step": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no weights: it has the keys step"):
        checkpoint.load(tmp_path / "other.pth")


def test_no_flipped_bit_gets_into_a_tensor(tmp_path: Path) -> None:
    """torch.load takes each of these numbers as it is."""
    whole, path = tmp_path / "whole.pth", tmp_path / "flipped.pth"
    weights = {"0.weight": torch.arange(64.0).view(8, 8), "0.bias": torch.arange(5)}
    checkpoint.save(whole, {"model": weights, "step": 3})
    data = whole.read_bytes()
    refused = taken = 0
    for place in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        taken += 1  # in the zip's padding, times and the like
        assert loaded["step"] == 3
        assert list(loaded["model"]) == list(weights)
        assert all(torch.equal(loaded["model"][name], weights[name]) for name in weights), place
    assert refused > 100
    start = data.index(weights["0.weight"].numpy().tobytes())
    flipped = bytearray(data)
    flipped[start + 7] ^= 1
    path.write_bytes(flipped)
    assert not torch.equal(torch.load(path)["model"]["0.weight"], weights["0.weight"])
    with pytest.raises(UserError, match=r"flipped\.pth is damaged \(Bad CRC-32 for file"):
        checkpoint.load(path)


def test_a_file_that_was_written_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoint.load(tmp_path / "w.pth")["model"]["w"], torch.ones(3))


@pytest.mark.device
def test_a_snapshot_is_of_its_moment_and_keeps_tied_weights_tied(tmp_path: Path) -> None:
    model = network().to(DEVICE)
    weights = model.state_dict()
    weights["tied"] = weights["0.weight"]
    queue, losses = torch.ones(4), [1.0]
    content = {"model": weights, "parts": {"queue": queue}, "losses": losses, "own": [queue]}
    before = {name: value.clone().cpu() for name, value in weights.items()}
    taken = checkpoint.snapshot(content, unshared=["own"])
    with torch.no_grad():
        for value in (*model.parameters(), queue):
            value.add_(1)
    losses.append(2.0)
    assert all(torch.equal(taken["model"][name], value) for name, value in before.items())
    assert torch.equal(taken["parts"]["queue"], torch.ones(4))
    assert taken["losses"] == [1.0]
    assert taken["own"][0] is queue
    assert taken["model"]["tied"] is taken["model"]["0.weight"]
    assert taken["model"]._metadata["0"] == {"version": 1}


def test_the_size_of_a_checkpoint_is_known_before(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    weights = model.state_dict()
    weights["tied"] = weights["0.weight"]
    content = {"model": weights, "rng": [torch.get_rng_state()], "step": 3}
    checkpoint.save(tmp_path / "c.pth", content)
    written = (tmp_path / "c.pth").stat().st_size
    assert written <= checkpoint.size_of(content) <= 1.02 * written


def test_weights_of_another_model_are_named_and_a_new_head_is_allowed() -> None:
    other = {**network(7).state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        checkpoint.select(other, network(3), Path("w.pth"))
    assert "1 left over (extra)" in str(error.value)
    assert "2 of another shape (1.weight, 1.bias)" in str(error.value)
    model = network(3)
    weights, fit = checkpoint.select(
        network(7).state_dict(), model, Path("w.pth"), may_differ=["1."]
    )
    model.load_state_dict(weights)
    assert fit.loaded == ["0.weight", "0.bias"]


_SAVE_ON_SMALL_DISK = """
import resource, sys, torch
from pathlib import Path
from zoo_common import checkpoint
from zoo_common.errors import TrainingError
path = Path(sys.argv[1])
checkpoint.save(path, {"model": {"w": torch.zeros(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    checkpoint.save(path, {"model": {"w": torch.zeros(1 << 20)}})
except TrainingError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_ON_SMALL_DISK, path], capture_output=True, text=True
    )
    assert f"Cannot write the checkpoint {path}: File too large" in done.stdout, done.stderr
    assert checkpoint.load(path)["model"]["w"].shape == (10,)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


_SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from zoo_common import checkpoint
step = 0
while True:
    checkpoint.save(Path(sys.argv[1]), {"model": {"w": torch.full((1 << 18,), float(step))}})
    step += 1
    print(step, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    for delay_s in (0.0, 0.003, 0.01):
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOR_EVER, path], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        weights = checkpoint.load(path)["model"]["w"]
        assert bool((weights == weights[0]).all())


@pytest.mark.device
def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        ours = torch.rand(1, device=DEVICE).item()
        return [random.random(), np.random.randn(), np.random.rand(), torch.rand(1).item(), ours]

    np.random.seed(3)
    np.random.randn()  # leaves half of a pair behind
    torch.rand(3, device=DEVICE)
    rng = checkpoint.as_tensors(checkpoint.rng_state(DEVICE))
    checkpoint.save(tmp_path / "c.pth", {"model": {}, "rng": rng})
    draws = draw()
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "c.pth")["rng"], DEVICE)
    assert draws == draw()


def test_a_read_only_place_is_told() -> None:
    with pytest.raises(TrainingError, match=r"Cannot write the checkpoint /proc/nothing/last\.pth"):
        checkpoint.save(Path("/proc/nothing/last.pth"), {"model": {}})
