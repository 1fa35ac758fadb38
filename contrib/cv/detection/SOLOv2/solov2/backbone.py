"""ResNet with a feature pyramid, as WXinlong/SOLO builds them for SOLOv2.

He et al., Deep Residual Learning, arXiv:1512.03385; Lin et al., Feature Pyramid Networks,
arXiv:1612.03144. Names of modules, and so the keys of weights, are those of
https://github.com/WXinlong/SOLO (commit 95f3732d, mmdet/models/{backbones/resnet,necks/fpn}.py);
the ResNet's are torchvision's. Stages are called by their index, 0 for ``layer1``.

Shape letters: B images, C channels, H W cells of a map.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from solov2.config import ModelConfig
from solov2.layers import conv, convolve_all, norm
from zoo_common.detection.extent import Extent

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Residual blocks of each stage, by depth."""

STRIDES = (4, 8, 16, 32, 64)
"""Pixels of the image per cell of the pyramid's maps."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first has the stride."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, *, stride: int, map_stride: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = norm(config.norm, width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = norm(config.norm, width)
        self.downsample = shortcut(inputs, width, stride, config.norm)
        self.stride = map_stride

    def forward(self, x_BCHW: Tensor, extent: Extent | None) -> Tensor:
        """Returns [B, width, H / stride, W / stride], zero beyond the extent."""
        past_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y_BCHW = _norm_relu(self.bn1, self.conv1, x_BCHW, extent, self.stride)
        return _norm_relu(self.bn2, self.conv2, y_BCHW, extent, self.stride, past_BCHW)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 has the stride."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int,
        map_stride: int,
        config: ModelConfig,
        deformable: str = "",
    ) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = norm(config.norm, width)
        self.conv2 = conv(width, width, 3, stride, deformable)
        self.bn2 = norm(config.norm, width)
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = norm(config.norm, outputs)
        self.downsample = shortcut(inputs, outputs, stride, config.norm)
        self.inner_stride = map_stride // stride

    def forward(self, x_BCHW: Tensor, extent: Extent | None) -> Tensor:
        """Returns [B, 4 * width, H / stride, W / stride]."""
        past_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y_BCHW = _norm_relu(self.bn1, self.conv1, x_BCHW, extent, self.inner_stride)
        y_BCHW = self.bn2(self.conv2, y_BCHW, relu=True)
        total_BCHW: Tensor = self.bn3(self.conv3, y_BCHW, plus_BCHW=past_BCHW, relu=True)
        return total_BCHW


class Shortcut(nn.Sequential):
    """A 1x1 convolution (``0``) and its normalisation (``1``)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns [B, outputs, H / stride, W / stride]."""
        y_BCHW: Tensor = self[1](self[0], x_BCHW)
        return y_BCHW


def shortcut(inputs: int, outputs: int, stride: int, kind: str) -> Shortcut | None:
    """What leads past a block, where the input itself does not fit."""
    if stride == 1 and inputs == outputs:
        return None
    return Shortcut(conv(inputs, outputs, 1, stride), norm(kind, outputs))


class ResNet(nn.Module):
    """The stem and stages ``layer1`` to ``layer4``.

    ``frozen_stages`` of the config: -1 trains all, 0 keeps the stem as it is, n also the first n
    stages.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem_channels, 7, 2, 3, bias=False)
        self.bn1 = norm(config.norm, config.stem_channels)
        inputs = config.stem_channels
        self.channels: list[int] = []
        for stage, count in enumerate(BLOCKS[config.depth]):
            blocks = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(self._block(inputs, stage, stride, config))
                inputs = blocks[-1].expansion * (config.base_channels << stage)
            self.add_module(f"layer{stage + 1}", nn.ModuleList(blocks))
            self.channels.append(inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.frozen_stages = config.frozen_stages
        if config.frozen_stages >= 0:
            for module in [self.conv1, self.bn1, *self.stages()[: config.frozen_stages]]:
                module.requires_grad_(False)

    @staticmethod
    def _block(
        inputs: int, stage: int, stride: int, config: ModelConfig
    ) -> BasicBlock | Bottleneck:
        width, map_stride = config.base_channels << stage, STRIDES[stage]
        if config.depth < 50:
            return BasicBlock(inputs, width, stride=stride, map_stride=map_stride, config=config)
        return Bottleneck(
            inputs,
            width,
            stride=stride,
            map_stride=map_stride,
            config=config,
            deformable=config.deformable if stage else "",
        )

    def stages(self) -> list[nn.Module]:
        """``layer1`` to ``layer4``."""
        return [self.get_submodule(f"layer{stage}") for stage in range(1, 5)]

    def forward(self, images_BCHW: Tensor, extent: Extent | None = None) -> list[Tensor]:
        """Returns the stages' maps, strides 4 to 32."""
        x_BCHW = _norm_relu(self.bn1, self.conv1, images_BCHW, extent, 2)
        # Zero acts as a border on what is not negative.
        x_BCHW = _clear(F.max_pool2d(x_BCHW, 3, 2, 1), extent, 4)
        maps = []
        for stage in self.stages():
            for block in stage.children():
                x_BCHW = block(x_BCHW, extent)
            maps.append(x_BCHW)
        return maps


class PyramidConv(nn.Module):
    """A convolution with bias, named ``conv`` as in the checkpoints."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns [B, outputs, H, W]."""
        (y_BCHW,) = convolve_all(self.conv, [x_BCHW])
        return y_BCHW


class FeaturePyramid(nn.Module):
    """Five maps of equal channels from a ResNet's stages: lateral 1x1, top-down sum, 3x3."""

    def __init__(self, inputs: list[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(PyramidConv(count, channels, 1) for count in inputs)
        self.fpn_convs = nn.ModuleList(PyramidConv(channels, channels, 3) for _ in inputs)

    def forward(self, stages: list[Tensor], extent: Extent | None = None) -> list[Tensor]:
        """Returns maps of strides 4 to 64, zero beyond the extent."""
        maps: list[Tensor] = []
        merged_BCHW: Tensor | None = None
        for level in reversed(range(len(stages))):
            lateral_BCHW = self.lateral_convs[level](stages[level])
            if merged_BCHW is not None:
                # By size, since NPUs take no scale_factor.
                lateral_BCHW += F.interpolate(merged_BCHW, lateral_BCHW.shape[-2:])
            merged_BCHW = _clear(lateral_BCHW, extent, STRIDES[level])
            maps.insert(0, _clear(self.fpn_convs[level](merged_BCHW), extent, STRIDES[level]))
        maps.append(F.max_pool2d(maps[-1], 1, 2))
        return maps


def _norm_relu(
    norm: nn.Module,
    layer: nn.Conv2d,
    x_BCHW: Tensor,
    extent: Extent | None,
    stride: int,
    plus_BCHW: Tensor | None = None,
) -> Tensor:
    """A convolution with normalisation, sum and ReLU, of this stride, zero beyond the extent."""
    y_BCHW: Tensor = norm(layer, x_BCHW, plus_BCHW=plus_BCHW, relu=extent is None)
    return y_BCHW if extent is None else F.relu_(extent.clear(y_BCHW, stride))


def _clear(map_BCHW: Tensor, extent: Extent | None, stride: int) -> Tensor:
    return map_BCHW if extent is None else extent.clear(map_BCHW, stride)
