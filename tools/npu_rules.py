"""What torch_npu's documents and our own precision rules ask of the tensors that operators take.

    broken_by(operator)         of an operator that npu_sim.record() saw
    with CallWatch() as watch:  of calls of torch's functions, whose arguments say more
        ...
    watch.broken

The formats that the documents name stand in ``common/npu_sim/npu_sim/data/torch_npu_dtypes.json``,
made by ``npu_data.py``; the other rules are the tables here, each with its source.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch.overrides import TorchFunctionMode

from model_dirs import ROOT

DATA = ROOT / "common" / "npu_sim" / "npu_sim" / "data" / "torch_npu_dtypes.json"

# Operators by another name than the function that the documents speak of.
FUNCTIONS = {
    "_log_softmax": "nn.functional.log_softmax",
    "_softmax": "nn.functional.softmax",
    "_upsample_bicubic2d_aa": "nn.functional.interpolate",
    "_upsample_bilinear2d_aa": "nn.functional.interpolate",
    "addmm": "addmm",
    "avg_pool2d": "nn.functional.avg_pool2d",
    "constant_pad_nd": "nn.functional.pad",
    "convolution": "nn.functional.conv2d",
    "convolution_overrideable": "nn.functional.conv2d",
    "grid_sampler_2d": "nn.functional.grid_sample",
    "grid_sampler_3d": "nn.functional.grid_sample",
    "im2col": "nn.functional.unfold",
    "max_pool2d_with_indices": "nn.functional.max_pool2d",
    "native_batch_norm": "nn.functional.batch_norm",
    "native_group_norm": "nn.functional.group_norm",
    "native_layer_norm": "nn.functional.layer_norm",
    "nll_loss2d_forward": "nn.functional.nll_loss",
    "nll_loss2d": "nn.functional.nll_loss",
    "nll_loss_forward": "nn.functional.nll_loss",
    "threshold": "nn.functional.relu",  # what the gradient of relu is called
    "upsample_bicubic2d": "nn.functional.interpolate",
    "upsample_bilinear2d": "nn.functional.interpolate",
    "upsample_nearest2d": "nn.functional.interpolate",
}
# They look at memory in another way and compute nothing, so no number format matters to them.
VIEWS = ("aten::as_strided*", "aten::_unsafe_view", "aten::unfold", "aten::diagonal")

OUR_RULES = "CONTRIBUTING.md, Rules"
PLUGIN_SOURCE = "op-plugin 517f2e7d, op_plugin/ops"


@dataclass(frozen=True)
class Rule:
    """What an operator's tensors have to be.

    Attributes:
        operators: fnmatch patterns of its name.
        dtypes: what the tensors that it is about have to be; none: it is not to be called.
        arguments: which of the tensors that the operator takes it is about, counted from 0; none
            speaks of all floating ones.
        reason: why.
        source: where that stands.
    """

    operators: tuple[str, ...]
    dtypes: frozenset[str]
    reason: str
    source: str
    arguments: tuple[int, ...] = ()

    def speaks_of(self, name: str) -> bool:
        """Whether an operator of that name is meant."""
        return any(fnmatchcase(name, pattern) for pattern in self.operators)


class Broken(NamedTuple):
    """A rule that an operator or a call breaks: what it does, what it should, and who says so."""

    what: str
    rule: str
    source: str


RULES = (
    Rule(
        (
            "aten::*_loss*",
            "aten::binary_cross_entropy*",
            "aten::_log_softmax*",
            "aten::kl_div*",
        ),
        frozenset({"float32", "float64"}),
        "losses are computed in float32",
        OUR_RULES,
    ),
    Rule(
        ("aten::native_batch_norm", "aten::batch_norm_gather_stats*", "aten::batch_norm_elemt*"),
        frozenset({"float32"}),
        "statistics of batch normalisation are float32",
        OUR_RULES,
        arguments=(1, 2, 3, 4),
    ),
    Rule(
        ("aten::native_batch_norm_backward",),  # behind a gradient and what was normalised
        frozenset({"float32"}),
        "statistics of batch normalisation are float32",
        OUR_RULES,
        arguments=(2, 3, 4, 5, 6),
    ),
    Rule(
        (
            "aten::adaptive_max_pool3d*",
            "aten::gcd*",
            "aten::isneginf*",
            "aten::isposinf*",
            "aten::polar*",
            "aten::scatter_reduce*",
            "aten::sinc*",
        ),
        frozenset(),
        "its kernel copies to the host and computes there",
        PLUGIN_SOURCE,
    ),
)


@functools.cache
def documents() -> Mapping[str, Any]:
    """The content of the file of formats."""
    content: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return content


@functools.cache
def documented(name: str) -> tuple[str, frozenset[str]] | None:
    """The function of the documents that an operator belongs to, and the formats that it takes.

    A backward operator belongs to its forward one.
    """
    base = name.partition("::")[2].partition(".")[0]
    forward = re.sub(r"_backward(_data)?$", "", base)
    formats = documents()["dtypes"]
    for word in dict.fromkeys((base, base.rstrip("_"), forward, forward.rstrip("_"))):
        spelled = [FUNCTIONS[word]] if word in FUNCTIONS else [word, f"nn.functional.{word}"]
        for function in spelled:
            if f"torch.{function}" in formats:
                return f"torch.{function}", frozenset(formats[f"torch.{function}"].split())
    return None


def broken_by(operator: Any) -> Iterator[Broken]:
    """The rules that an operator breaks.

    Args:
        operator: has ``name``, ``inputs`` and ``outputs``, pairs of number format and shape.
    """
    name = operator.name
    if any(fnmatchcase(name, pattern) for pattern in VIEWS):
        return
    formats = [dtype for dtype, _ in operator.inputs]
    known = documented(name)
    if known and formats and formats[0] not in known[1]:
        allowed = ", ".join(sorted(known[1]))
        source = f"torch_npu {documents_of()} documents, {known[0]}"
        yield Broken(f"{name} takes {formats[0]}", f"it is documented for {allowed}", source)
    for rule in RULES:
        if not rule.speaks_of(name):
            continue
        if not rule.dtypes:
            yield Broken(name, rule.reason, rule.source)
        places = rule.arguments or range(len(formats))
        given = [formats[place] for place in places if place < len(formats)]
        if not rule.arguments:
            given = [dtype for dtype in given if "float" in dtype]
        for dtype in sorted(set(given) - rule.dtypes) if rule.dtypes else ():
            yield Broken(f"{name} takes {dtype}", rule.reason, rule.source)


def documents_of() -> str:
    """The versions whose documents were read, such as ``2.7.1 to 2.13.0``."""
    places = [place.split("/")[-2] for place in documents()["source"]["documents"]]
    spelled = [place.removeprefix("pytorch_").replace("-", ".") for place in places]
    return f"{spelled[0]} to {spelled[-1]}"


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _interpolate(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    given = _argument(args, kwargs, 2, "scale_factor") is not None
    return "give size: scale_factor is not supported" if given else None


def _topk(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    unsorted = _argument(args, kwargs, 4, "sorted") is False
    return "sorted=False is not supported" if unsorted else None


def _max_pool2d(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    dilation = _argument(args, kwargs, 4, "dilation")
    return None if dilation in (None, 1, (1, 1), [1, 1]) else "dilation has to be 1"


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    query = _argument(args, kwargs, 0, "query")
    value = _argument(args, kwargs, 2, "value")
    mask = _argument(args, kwargs, 3, "attn_mask")
    if query.dim() != 4:
        return "query, key and value have to be of shape (N, heads, length, channels)"
    if query.shape[-1] > 512 or value.shape[-1] != query.shape[-1]:
        return "query and value have to have the same number of channels, at most 512"
    if mask is not None and str(mask.dtype) != "torch.bool":
        return f"attn_mask has to be bool, and is {mask.dtype}"
    if mask is not None and _argument(args, kwargs, 5, "is_causal"):
        return "with is_causal there can be no attn_mask"
    return None


CALLS: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], str | None]] = {
    "interpolate": _interpolate,
    "max_pool2d": _max_pool2d,
    "scaled_dot_product_attention": _attention,
    "topk": _topk,
}


class CallWatch(TorchFunctionMode):
    """Applies the rules of CALLS to the calls of torch's functions inside it.

    Attributes:
        broken: the rules that were broken, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.broken: list[Broken] = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function; PyTorch calls this."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        said = CALLS[name](args, kwargs) if name in CALLS else None
        if said:
            found = Broken(
                f"a call of {name}", said, f"torch_npu {documents_of()} documents, {name}"
            )
            if found not in self.broken:
                self.broken.append(found)
        return func(*args, **kwargs)
