"""Weights that anybody may hand in: checkpoints, pickles, files of other projects."""

import collections
import importlib
import io
import os
import pickle
import socket
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzzing import ForbiddenError, amounts, feed, spoiled, spoiled_tree, watched
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from zoo_common import checkpoint, pickles, preflight
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig, RunConfig
from zoo_common.errors import UserError
from zoo_common.run import Metric, TrainState, start_run
from zoo_common.weights import check_settings, match, read_content

CPU = torch.device("cpu")


class Call:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def content() -> dict[str, Any]:
    weights = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.zeros(2)}
    return {
        "format": 1,
        "model": weights,
        "step": 7,
        "parts": {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}},
        "rng": [{"torch": torch.get_rng_state()[:16], "python": [3, [1, 2], None]}],
        "config": "model:\n  depth: 4\n",
    }


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


GADGETS = [
    b"cos\nsystem\n(S'touch ran'\ntR.",
    b"cbuiltins\nexec\n(Vopen('ran','w')\ntR.",
    b"cbuiltins\neval\n",
    b"cposix\nsystem\n",
    b"c__builtin__\ngetattr\n",
    b"cbuiltins\ngetattr\n",
    b"ctorch.jit\nload\n",
    b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"cargparse\nNamespace\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"ctorch\nStorage\n",
    b")R", b"tR", b"\x81", b"\x92", b"b", b"Q", b"0", b"(", b"t", b"}", b"]", b"a", b"s", b"u",
    b"2", b"h\x00", b"K\xff", b"N", b"X\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x7f",
]  # fmt: skip


@st.composite
def zips(draw: DrawFn) -> bytes:
    """A checkpoint's zip file with another pickle or other records in it."""
    valid = draw(st.sampled_from([saved(content()), saved(content()["model"])]))
    parts = {}
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        for name in archive.namelist():
            parts[name] = archive.read(name)
    name = draw(st.sampled_from(sorted(parts)))
    kind = draw(st.sampled_from(["spoil", "spoil", "spoil", "remove", "empty", "rename"]))
    if kind == "spoil":
        parts[name] = draw(spoiled([parts[name]], GADGETS))
    elif kind == "empty":
        parts[name] = b""
    else:
        data = parts.pop(name)
        if kind == "rename":
            parts[draw(st.sampled_from(["../x", "/x", "archive/data/0", "a" * 300]))] = data
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    return stream.getvalue()


CHECKPOINTS = [
    saved(content()),
    saved(content()["model"]),
    saved(content(), _use_new_zipfile_serialization=False),
    saved({"state_dict": content()["model"], "epoch": 3}),
]


@amounts
def test_checkpoints(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "last.pth"

    def read_checkpoint(data: bytes) -> None:
        path.write_bytes(data)
        preflight.check_checkpoint_file(path, "--resume")
        loaded = checkpoint.load(path)
        assert isinstance(loaded["model"], dict)

    inputs = st.one_of(zips(), spoiled(CHECKPOINTS, GADGETS))
    for data in CHECKPOINTS:
        read_checkpoint(data)
    feed(read_checkpoint, inputs, amount, tmp_path)


def arrays() -> dict[str, Any]:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    return {
        "model": {"w": weight, "t": np.asfortranarray(weight), "s": np.float32(0.5)},
        "ordered": collections.OrderedDict(first=np.ones(2, np.int64), second=1),
        "plain": [1, -2, 2**40, True, None, 1.5, (1, 2), "é", b"\xff"],
    }


@amounts
def test_pickles(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    valid = [pickle.dumps(arrays(), protocol=protocol) for protocol in range(6)]

    def read_pickle(data: bytes) -> None:
        path.write_bytes(data)
        assert isinstance(pickles.load_arrays(path), dict)

    for data in valid:
        read_pickle(data)
    feed(read_pickle, spoiled(valid, GADGETS), amount, tmp_path)


NAMES = {
    "rcnn": ["backbone.bottom_up.stem.conv1.weight", "roi_heads.box_predictor.cls_score.weight",
             "pixel_mean", "pixel_std", "conv1_w", "conv1_gn_s", "res2_0_branch2a_w",
             "res2_0_branch2b_w", "res2_0_branch2a_bn_s", "cls_score_w", "bbox_pred_b",
             "layer1.0.conv1.weight", "res2.0.conv1.weight", "stem.fc.weight", "fc.weight"],
    "solov2": ["bbox_head.solo_cate.weight", "mask_head.conv_cls.weight", "layer1.0.conv1.weight",
               "backbone.conv1.weight", "backbone.layer1.0.bn1.num_batches_tracked"],
    "glip": ["rpn.head.bias_lang", "bbox_head.head.bias_lang", "layers.0.blocks.0.attn.qkv.weight",
             "backbone.downsample.0.weight", "bbox_head.head.scales.0.scale",
             "layers.0.downsample.reduction.weight", "backbone.patch_embed.projection.weight"],
    "declip": ["module.logit_scale", "module.encode_text.token_embedding.weight", "logit_scale",
               "encode_text.token_embedding.weight"],
}  # fmt: skip
"""Names by which each model's reader tells kinds of files, and that it has rules for."""


def files_of(names: list[str]) -> list[Any]:
    """Files with these tensors, of which a list says the shape, or with one and what is beside."""
    config = "model:\n  pixel_mean: [1, 2, 3]\n  pixel_std: [1, 1, 1]\n  fusion_heads: 8\n"
    beside = {"format": 1, "config": config, "meta": {"config": "mean=[1.0], std=[2]"}}
    whole = {"model": {name: [4, 4] for name in names}, "__author__": "torchvision", **beside}
    return [whole, *({"state_dict": {name: [8]}, **beside} for name in names)]


def with_tensors(value: Any) -> Any:
    """Lists of a few small numbers as tensors of that shape."""
    if isinstance(value, dict):
        return {name: with_tensors(inner) for name, inner in value.items()}
    small = isinstance(value, list) and len(value) <= 5
    if small and all(type(length) is int and 0 <= length <= 8 for length in value):
        return torch.zeros(value, dtype=torch.float16 if len(value) == 3 else torch.float32)
    return value


class Config:
    """Section ``model`` of a config, with every setting."""

    def __getattr__(self, name: str) -> Any:
        return [1.0, 2.0, 3.0]


@amounts
@pytest.mark.parametrize("package", NAMES)
def test_weights_of_other_projects(package: str, amount: int, tmp_path: Path) -> None:
    weights = importlib.import_module(f"{package}.weights")
    names = NAMES[package]
    model = torch.nn.Linear(4, 4)
    path = tmp_path / "weights.pth"

    def read_weights(tree: Any) -> None:
        torch.save(with_tensors(tree), path)
        read_content(path)
        if hasattr(weights, "read"):
            found = weights.read(path)
            match(found, model).details()
            check_settings(found, Config())
            if weights._READER.class_layer:
                weights.count_classes(path)
        weights.load_for_evaluation(model, path)

    read_weights.__qualname__ += package
    trees = files_of(names)
    feed(read_weights, spoiled_tree(trees), amount // len(NAMES), tmp_path, all_refused=True)


class Points:
    """Training data without data."""

    steps_per_epoch = 4

    def seek(self, step: int, met: Any = ()) -> None:
        """Nothing moves."""


@amounts
def test_states_to_resume_from(amount: int, tmp_path: Path) -> None:
    """Checkpoints that are whole and hold something else than a run's state."""
    output = tmp_path / "output"
    output.mkdir()
    torch.manual_seed(0)
    path = tmp_path / "last.pth"
    settings = RunConfig(device="cpu", output_dir=str(output), save_in_background=False)
    config = RunSettings(DataSettings(), PrecisionConfig(), settings)
    with start_run(config, Metric("fit", "percent")) as run:
        model = torch.nn.Linear(2, 2)
        precision = Precision(config.precision, model, torch.optim.AdamW(model.parameters()), CPU)
        state = TrainState(precision, Points(), 8, 8)
        model(torch.ones(1, 2)).sum().backward()
        precision.optimizer.step()
        state.step = 3
        run.save(state)
        valid = checkpoint.load(next((output / "checkpoints").glob("step*.pth")))

        def resume_from(content: dict[str, Any]) -> None:
            torch.save(content, path)
            run.config.run.resume = str(path)
            run.resume(state)

        resume_from(valid)
        assert state.step == 3
        feed(resume_from, spoiled_tree([valid]), amount, tmp_path)
        run.config.run.resume = ""


@dataclass
class DataSettings:
    """What a run's result says of them."""

    batch_size: int = 8


@dataclass
class RunSettings:
    """What a run needs of a config."""

    data: DataSettings

    precision: PrecisionConfig
    run: RunConfig


@amounts
def test_weights_of_bert(amount: int, tmp_path: Path) -> None:
    from glip.weights import _read_bert

    path = tmp_path / "model.safetensors"
    tensors = {"bert.pooler.dense.weight": torch.ones(2, 2), "embeddings": torch.zeros(3)}
    valid = safetensors.torch.save(tensors)

    def read_bert(data: bytes) -> None:
        path.write_bytes(data)
        _read_bert(path)

    read_bert(valid)
    words = [b'"dtype":"F32"', b'"BF16"', b'"data_offsets":[0,9999999999]', b'"shape":[-1]']
    feed(read_bert, spoiled([valid], words), amount, tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(
    legacy: bool, tmp_path: Path
) -> None:
    """That torch.load would run it is what makes this test mean something."""
    ran = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    evil = {"model": content()["model"], "extra": Call(Path.touch, ran)}
    torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
    with watched(tmp_path), pytest.raises(UserError, match="refused"):
        checkpoint.load(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": Call(Path.touch, ran)}))
    with watched(tmp_path), pytest.raises(UserError, match="refused"):
        pickles.load_arrays(path)
    assert not ran.exists()
    pickle.loads(path.read_bytes())
    assert ran.exists()


def test_what_is_watched_is_seen(tmp_path: Path) -> None:
    """The audit hook, without which the tests above would prove little."""
    for forbidden in (
        lambda: subprocess.run(["true"], check=False),
        lambda: os.system("true"),
        lambda: eval("1"),
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: (tmp_path.parent / "outside").write_text(""),
        os.fork,
    ):
        with pytest.raises(ForbiddenError), watched(tmp_path):
            forbidden()
    with watched(tmp_path):
        (tmp_path / "inside").write_text("")
