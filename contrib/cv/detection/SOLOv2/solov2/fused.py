"""Convolutions of float32 on a CPU, without gradients, in one pass with what stands behind them.

The weights, with the normalisation multiplied in, are in oneDNN's order, and a sum and a ReLU are
applied to what is still in a cache. Wide 3x3 convolutions multiply less instead, by
:mod:`zoo_common.winograd`. The weights made for that are kept as long as the layer's own live and
stay what they were; they are in no ``state_dict``.

Shape letters: B images, C input and O output channels, H W cells of a map.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from zoo_common import winograd
from zoo_common.winograd.kept import Versions, versions


class _Made(NamedTuple):
    """A layer's weights with its normalisation.

    Attributes:
        weight: in oneDNN's order; in torch's, if ``size`` is None.
        bias_O: added to each output.
        size: of the input, on which oneDNN's order depends.
        state: of the tensors that they were made of.
    """

    weight: Tensor
    bias_O: Tensor
    size: torch.Size | None
    state: Versions


_kept: MutableMapping[Tensor, _Made] = WeakTensorKeyDictionary()


def suits(x_BCHW: Tensor, layer: nn.Conv2d, sources: Sequence[Tensor]) -> bool:
    """Whether :func:`convolve` takes these."""
    return (
        not torch.is_grad_enabled()
        and type(layer) is nn.Conv2d
        and winograd.takes(sources, [x_BCHW])
    )


def convolve(
    layer: nn.Conv2d,
    x_BCHW: Tensor,
    sources: Sequence[Tensor],
    fold: Callable[[], tuple[Tensor, Tensor]],
    plus_BOHW: Tensor | None,
    relu: bool,
) -> Tensor:
    """What the layer computes with the weight and the bias of ``fold``.

    Args:
        layer: gives stride and padding.
        x_BCHW: its input.
        sources: of what ``fold`` gives, with the layer's weight in front.
        fold: called where they changed.
        plus_BOHW: added to the result.
        relu: whether a ReLU is applied at the end.

    Returns:
        [B, O, H / stride, W / stride] in channels-last memory.
    """
    made = _weights(layer, x_BCHW, sources, fold)
    if made.size is None:
        (y_BOHW,) = winograd.conv3x3([x_BCHW], made.weight, made.bias_O)
        return finish(y_BOHW, plus_BOHW, relu)
    settings = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    run = torch.ops.mkldnn._convolution_pointwise
    total_BOHW: Tensor
    if plus_BOHW is None:
        after = "relu" if relu else "none"
        total_BOHW = run(x_BCHW, made.weight, made.bias_O, *settings, after, [], "")
    else:
        given = (x_BCHW, plus_BOHW, made.weight, made.bias_O)
        total_BOHW = run.binary(*given, *settings, "add", 1.0, "relu" if relu else None, [], "")
    return total_BOHW


def finish(y_BOHW: Tensor, plus_BOHW: Tensor | None, relu: bool) -> Tensor:
    """Adds ``plus_BOHW`` in place, and applies a ReLU in place."""
    if plus_BOHW is not None:
        y_BOHW += plus_BOHW
    return F.relu_(y_BOHW) if relu else y_BOHW


def forget(layer: nn.Conv2d) -> None:
    """Drops what is kept of a layer, which training is about to change."""
    _kept.pop(layer.weight, None)


def _weights(
    layer: nn.Conv2d,
    x_BCHW: Tensor,
    sources: Sequence[Tensor],
    fold: Callable[[], tuple[Tensor, Tensor]],
) -> _Made:
    """The layer's weights, from before if what they were made of is what it was."""
    state = versions(*sources)
    made = _kept.get(layer.weight)
    if made is not None and made.state == state and made.size in (None, x_BCHW.shape):
        return made
    _kept.pop(layer.weight, None)  # the memory of the old ones, before that of the new
    with torch.inference_mode(False), torch.no_grad():  # they are kept beyond that mode
        weight, bias_O = fold()
        size = None
        if layer.stride != (1, 1) or not winograd.suits([x_BCHW], weight):
            size = x_BCHW.shape
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, layer.padding, layer.stride, layer.dilation, layer.groups, list(size)
            )
    made = _kept[layer.weight] = _Made(weight, bias_O, size, state)
    return made
