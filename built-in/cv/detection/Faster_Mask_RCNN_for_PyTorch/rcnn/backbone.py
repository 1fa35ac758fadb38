"""ResNet with a feature pyramid, as detectron2 builds them for its R-CNN models.

He et al., Deep Residual Learning, arXiv:1512.03385; Lin et al., Feature Pyramid Networks,
arXiv:1612.03144. Names of modules, and so the keys of weights, are those of
https://github.com/facebookresearch/detectron2 (commit be792b95, Apache-2.0,
modeling/backbone/{resnet,fpn}.py).

What differs, with the same numbers: a frozen batch normalisation is multiplied into the weights
of its convolution, which saves a pass over every activation and its memory. And an image may be
padded beyond what its batch needs (:mod:`zoo_common.detection.extent`): the padding is kept at
zero in front of every operator that looks at neighbours, so that it acts as the border of the
image does.

Shape letters: B images, C channels, H W pixels of a map.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_common.detection.extent import Extent

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Residual blocks of each stage, by depth."""

STRIDES = (4, 8, 16, 32, 64)
"""Pixels of the image per cell of p2 to p6."""

GROUPS = 32  # of group normalisation


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics and weights are constants; new: the identity."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, each of shape [C]: it is x * scale + shift."""
        scale_C = self.weight * (self.running_var + self.eps).rsqrt()
        return scale_C, self.bias - self.running_mean * scale_C


class Conv(nn.Conv2d):
    """A convolution with its normalisation as ``norm``; without one it has a bias."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, norm: str, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=norm == ""
        )
        self.norm: nn.Module | None = None
        if norm == "FrozenBN":
            self.norm = FrozenBatchNorm(outputs)
        elif norm == "GN":
            self.norm = nn.GroupNorm(GROUPS, outputs)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a new [B, outputs, H / stride, W / stride] that may be changed in place."""
        if not isinstance(self.norm, FrozenBatchNorm):
            y_BCHW = super().forward(x_BCHW)
            return y_BCHW if self.norm is None else self.norm(y_BCHW)
        scale_C, shift_C = self.norm.scale_and_shift()
        weight = self.weight * scale_C.view(-1, 1, 1, 1)
        if not torch.is_autocast_enabled(x_BCHW.device.type):
            weight, shift_C = weight.to(x_BCHW.dtype), shift_C.to(x_BCHW.dtype)
        return F.conv2d(
            x_BCHW, weight, shift_C, self.stride, self.padding, self.dilation, self.groups
        )


@torch.no_grad()
def measure_frozen_norms(network: nn.Module, images_BCHW: Tensor) -> int:
    """Gives frozen normalisations the statistics of these images, layer after layer.

    For a network without loaded weights: its constants are the identity, so that each residual
    block adds to the size of the activations, and the first steps end in NaN.

    Returns:
        How many were set.
    """

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Conv)
        assert isinstance(layer.norm, FrozenBatchNorm)
        y_BCHW = F.conv2d(
            inputs[0], layer.weight, None, layer.stride, layer.padding, groups=layer.groups
        )
        layer.norm.running_mean.copy_(y_BCHW.mean(dim=(0, 2, 3)))
        layer.norm.running_var.copy_(y_BCHW.var(dim=(0, 2, 3)))

    layers = [m for m in network.modules() if isinstance(m, Conv)]
    layers = [layer for layer in layers if isinstance(layer.norm, FrozenBatchNorm)]
    handles = [layer.register_forward_pre_hook(measure) for layer in layers]
    network(images_BCHW)
    for handle in handles:
        handle.remove()
    return len(layers)


def xavier_fill(layer: nn.Conv2d | nn.Linear) -> None:
    """Caffe2's XavierFill: uniform with variance 1 / fan-in; zero bias."""
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        inputs: channels that come in.
        width: channels of the 3x3 convolution.
        outputs: channels that go out.
        stride: of the block; in which convolution says ``stride_in_1x1``.
        map_stride: pixels of the image per cell behind the block.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        *,
        stride: int,
        map_stride: int,
        groups: int,
        norm: str,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = Conv(inputs, outputs, 1, norm, stride) if inputs != outputs else None
        self.conv1 = Conv(inputs, width, 1, norm, first)
        self.conv2 = Conv(width, width, 3, norm, second, groups)
        self.conv3 = Conv(width, outputs, 1, norm)
        self.inner_stride = map_stride // second

    def forward(self, x_BCHW: Tensor, extent: Extent | None) -> Tensor:
        """Returns [B, outputs, H / stride, W / stride]."""
        y_BCHW = self.conv1(x_BCHW)
        if extent is not None:
            y_BCHW = extent.clear(y_BCHW, self.inner_stride)
        y_BCHW = self.conv2(y_BCHW.relu_()).relu_()
        shortcut_BCHW = x_BCHW if self.shortcut is None else self.shortcut(x_BCHW)
        out_BCHW: Tensor = self.conv3(y_BCHW).add_(shortcut_BCHW).relu_()
        return out_BCHW


class Stem(nn.Module):
    """A 7x7 convolution and max pooling: a quarter of the resolution."""

    def __init__(self, outputs: int, norm: str) -> None:
        super().__init__()
        self.conv1 = Conv(3, outputs, 7, norm, stride=2)

    def forward(self, images_BCHW: Tensor, extent: Extent | None) -> Tensor:
        """Returns [B, outputs, H / 4, W / 4]."""
        y_BCHW = self.conv1(images_BCHW)
        if extent is not None:
            y_BCHW = extent.clear(y_BCHW, 2)  # zero acts as a border on what is not negative
        return F.max_pool2d(y_BCHW.relu_(), 3, 2, 1)


class ResNet(nn.Module):
    """The stem and stages ``res2`` to ``res5``; the first ``freeze_at`` of them are constants."""

    def __init__(
        self,
        depth: int,
        *,
        stem_channels: int,
        res2_channels: int,
        groups: int,
        width_per_group: int,
        norm: str,
        stride_in_1x1: bool,
        freeze_at: int,
    ) -> None:
        super().__init__()
        self.stem = Stem(stem_channels, norm)
        self.channels = [res2_channels << stage for stage in range(4)]
        self.frozen_stages = max(0, freeze_at - 1)
        inputs = stem_channels
        for stage, count in enumerate(BLOCKS[depth]):
            blocks = nn.ModuleList()
            for index in range(count):
                blocks.append(
                    Bottleneck(
                        inputs,
                        groups * width_per_group << stage,
                        self.channels[stage],
                        stride=2 if stage and not index else 1,
                        map_stride=STRIDES[stage],
                        groups=groups,
                        norm=norm,
                        stride_in_1x1=stride_in_1x1,
                    )
                )
                inputs = self.channels[stage]
            self.add_module(f"res{stage + 2}", blocks)
        for module in [self.stem, self.res2, self.res3, self.res4, self.res5][:freeze_at]:
            module.requires_grad_(False)

    def forward(self, images_BCHW: Tensor, extent: Extent | None = None) -> list[Tensor]:
        """Returns the maps of res2 to res5, strides 4 to 32."""
        x_BCHW = self.stem(images_BCHW, extent)
        maps = []
        for name in ("res2", "res3", "res4", "res5"):
            for block in self.get_submodule(name).children():
                x_BCHW = block(x_BCHW, extent)
            maps.append(x_BCHW)
        return maps


class FeaturePyramid(nn.Module):
    """``p2`` to ``p6`` from a ResNet's stages: lateral 1x1, top-down sum, 3x3."""

    def __init__(self, bottom_up: ResNet, channels: int, norm: str) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        for level, inputs in enumerate(bottom_up.channels, start=2):
            lateral, output = Conv(inputs, channels, 1, norm), Conv(channels, channels, 3, norm)
            xavier_fill(lateral)
            xavier_fill(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)

    def forward(self, images_BCHW: Tensor, extent: Extent | None = None) -> list[Tensor]:
        """Returns p2 to p6, strides 4 to 64; zero outside of ``extent``."""
        stages = self.bottom_up(images_BCHW, extent)
        maps: list[Tensor] = []
        merged_BCHW: Tensor | None = None
        for index in reversed(range(len(stages))):
            lateral_BCHW = self.get_submodule(f"fpn_lateral{index + 2}")(stages[index])
            if merged_BCHW is not None:
                # By size, since NPUs take no scale_factor.
                larger_BCHW = F.interpolate(merged_BCHW, lateral_BCHW.shape[-2:])
                lateral_BCHW = lateral_BCHW + larger_BCHW
            merged_BCHW = self._clear(lateral_BCHW, extent, STRIDES[index])
            output_BCHW = self.get_submodule(f"fpn_output{index + 2}")(merged_BCHW)
            maps.insert(0, self._clear(output_BCHW, extent, STRIDES[index]))
        maps.append(F.max_pool2d(maps[-1], 1, 2))
        return maps

    @staticmethod
    def _clear(map_BCHW: Tensor, extent: Extent | None, stride: int) -> Tensor:
        return map_BCHW if extent is None else extent.clear(map_BCHW, stride)
