"""3x3 convolutions on a CPU with a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3), Lavin & Gray, arXiv:1509.09308: maps are cut into tiles
of 4 x 4 outputs, which see 6 x 6 inputs; at the 36 places of a tile, transformed inputs and
filters are multiplied, channel by channel: 36 matrix products where the plain way needs 144.
Nothing is compiled: the products are oneDNN's, and the transforms operators of torch.

``points`` tells how tiles and filters are transformed, ``inference`` and ``training`` do it, and
``kept`` tells whether what was made of weights still holds. A network on the CPU has this speed
from 96 channels on, with gradients from 256; narrow ones and other devices have torch's
convolution.

Shape letters: B images, C channels, O outputs, H W cells of a map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo_common.winograd import inference, training
from zoo_common.winograd.points import CELLS

FEWEST_TILES = 80
FEWEST_CHANNELS = 48  # C O / (C + O): with fewer, the transforms take what the products save
FEWEST_TO_TRAIN = 128  # the same with gradients


def conv3x3(
    maps_BCHW: Sequence[Tensor], weight_OC33: Tensor, bias_O: Tensor | None = None
) -> list[Tensor]:
    """A convolution of 3x3, stride 1 and padding 1 over maps of any sizes that share its weights.

    Equal to ``F.conv2d`` of each map but for rounding: against float64 its error is 2e-6 to 5e-6
    of the largest output, that of ``F.conv2d`` half as much (``tools/bench/winograd.py``). It is
    ``F.conv2d`` wherever :func:`suits` is false.

    The transformed filters are kept as long as the weight lives: 16 bytes for each of its numbers;
    while they are made, in float64, several times that. They are made anew when the weight was
    changed in place or its memory replaced, and dropped by the first call that records gradients.
    A change past autograd's counting, as ``weight.data.mul_()``, is not seen. What the transforms
    of the last sizes of maps need is kept too, 26 MB at most for any number of layers.

    Args:
        maps_BCHW: at best in channels-last memory. Together, since many tiles make good products.
        weight_OC33: the layer's own tensor: of a temporary one nothing can be kept.
        bias_O: added to each output.

    Returns:
        Maps [B, O, H, W] in channels-last memory where :func:`suits` is true.
    """
    if torch.is_grad_enabled():
        inference.forget(weight_OC33)
    if not suits(maps_BCHW, weight_OC33):
        return [F.conv2d(map_BCHW, weight_OC33, bias_O, padding=1) for map_BCHW in maps_BCHW]
    if torch.is_grad_enabled():
        return training.convolve(maps_BCHW, weight_OC33, bias_O)
    return inference.convolve(maps_BCHW, weight_OC33, bias_O)


def suits(maps_BCHW: Sequence[Tensor], weight_OC33: Tensor) -> bool:
    """Whether :func:`conv3x3` saves multiplications: where it is known to be quicker.

    On a CPU with oneDNN, in float32, without autocast, not while a graph is traced; for enough
    tiles and channels; with gradients, for sides that are multiples of 4.
    """
    outputs, channels = weight_OC33.shape[:2]
    tiles = sum(len(x) * -(-x.shape[2] // CELLS) * -(-x.shape[3] // CELLS) for x in maps_BCHW)
    gradients = torch.is_grad_enabled()
    fewest = FEWEST_TO_TRAIN if gradients else FEWEST_CHANNELS
    whole = all(x.shape[2] % CELLS == x.shape[3] % CELLS == 0 for x in maps_BCHW)
    return (
        tiles >= FEWEST_TILES
        and channels * outputs >= fewest * (channels + outputs)
        and (whole or not gradients)
        and weight_OC33.shape[2:] == (3, 3)
        and takes([weight_OC33], maps_BCHW)
    )


def takes(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether oneDNN's own operators take these, and what is made of the weights may be kept.

    On a CPU with oneDNN, in float32, without autocast, not while a graph is traced.
    """
    return (
        all(one.device.type == "cpu" and one.dtype is torch.float32 for one in (*weights, *inputs))
        and not torch.is_autocast_enabled("cpu")
        and not any(one.is_inference() for one in weights)  # these count no changes
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )
