"""Twins-SVT (ALTGVT) and Twins-PCPVT, image classifiers.

Paper: Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
NeurIPS 2021, arXiv:2104.13840. The positional encoding generator (PEG) is CPVT's,
arXiv:2102.10882; the pyramid and the spatially reduced attention are PVT's, arXiv:2102.12122.

Follows ``gvt.py`` of https://github.com/Meituan-AutoML/Twins, Apache-2.0: commit
4700293a2d0a91826ab357fc5b9bc1468ae0e987 stands on the card, c1ff6714 was read. Parameter names,
shapes and order are that file's, so its checkpoints, those of timm's ``twins_*`` models and their
optimizer states load as they are.

Differences from upstream:

* Any image size of at least ``min_image_size`` pixels a side works; upstream's classifier raises
  where a feature map does not divide by the window. ``Twins`` says what happens.
* Feature maps stay (B, H, W, C) throughout. Convolutions whose stride is their kernel are one
  matrix product over patches, and the windows are cut out of the joint query, key and value map
  in a single copy.
* The result is the same to rounding; only the order of summation differs.

Shapes:
    B images, H W rows and columns of a feature map (of tokens) or of an image (of pixels),
    C channels, K attention heads, D = C / K channels of a head,
    G windows over the whole batch, T = window * window tokens of a window,
    N = H * W tokens, M keys of a global attention, s stride of a patch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo_common.errors import UserError

BLOCK_NORM_EPS = 1e-6  # norms of the blocks and the last one; all others have PyTorch's 1e-5
SMALL_KEY_COUNT = 128
ONEDNN = torch.backends.mkldnn.is_available()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of (..., W, C), for maps on the CPU in float32 by way of oneDNN.

    ATen's float32 product calls MKL, which leaves processors of other makers than Intel on a slow
    path. oneDNN knows no maker, and a 1 x 1 convolution in channels-last order is the same
    product: twice the speed on an AMD EPYC, forward and backward. Each row of the map goes in as
    an image of its own, because ATen with one thread hands a convolution to oneDNN from 16
    images on.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() < 4 or not ONEDNN:
        return F.linear(x, weight, bias)
    rows_RC1W = x.reshape(-1, 1, *x.shape[-2:]).permute(0, 3, 1, 2)
    y_RC1W = F.conv2d(rows_RC1W, weight[:, :, None, None], bias)
    return y_RC1W.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """``nn.Linear`` by way of ``_linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, from (B, H, W, C) to (B, H // s, W // s, C').

    As in every such convolution, rows and columns that fill no patch (H % s at the bottom, W % s
    at the right) are left out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=stride, stride=stride)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        s = self.stride[0]
        x_BHWC = x_BHWC[:, : H // s * s, : W // s * s]
        patches = x_BHWC.reshape(B, H // s, s, W // s, s, C).permute(0, 1, 3, 2, 4, 5)
        weight = self.weight.permute(0, 2, 3, 1)  # out, row, column, in: the order of a patch
        return _linear(patches.reshape(B, H // s, W // s, -1), weight.flatten(1), self.bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax attention of (B, K, queries, D) on (B, K, keys, D) with scale 1 / sqrt(D).

    With the few keys that Twins has at 224 pixels (49), the CPU's fused kernel is slower than the
    two products that it fuses. Other devices, and large images, take the fused kernel.
    """
    if q.device.type != "cpu" or k.shape[-2] > SMALL_KEY_COUNT:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    q_all, k_all, v_all = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    # Scales inside the product; beta 0 leaves out the summand.
    logits = torch.baddbmm(
        q.new_empty(()), q_all, k_all.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5
    )
    weights = F.dropout(logits.softmax(dim=-1), dropout)
    return torch.bmm(weights, v_all).unflatten(0, q.shape[:2])


class WindowAttention(nn.Module):
    """LSA, locally-grouped self-attention: tokens attend within their window (section 3.2).

    A map that does not divide by the window is padded with zeros at the bottom and the right, as
    in upstream's detection backbone and in timm. The padding takes part in the softmax (its key
    and value are the biases of ``qkv``) and is cut off afterwards.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int, *, drop_rate: float, attn_drop_rate: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.attn_drop_rate = attn_drop_rate
        self.qkv = Linear(dim, dim * 3)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        ws, K, D = self.window, self.num_heads, C // self.num_heads
        if H % ws or W % ws:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, -W % ws, 0, -H % ws))
        rows, columns = math.ceil(H / ws), math.ceil(W / ws)

        qkv = self.qkv(x_BHWC).view(B, rows, ws, columns, ws, 3, K, D)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B * rows * columns, K, ws * ws, D)
        y_GKTD = _attend(*qkv.unbind(0), self.attn_drop_rate if self.training else 0.0)
        y = y_GKTD.view(B, rows, columns, K, ws, ws, D).permute(0, 1, 4, 2, 5, 3, 6)
        y_BHWC = y.reshape(B, rows * ws, columns * ws, C)[:, :H, :W]
        return self.proj_drop(self.proj(y_BHWC))


class GlobalAttention(nn.Module):
    """GSA, global sub-sampled attention: every token attends to one key per s x s patch.

    With ``sr_ratio`` 1 there is nothing to sub-sample and it is plain self-attention, without
    ``sr`` and ``norm``. Rows and columns that fill no patch give no key (section 3.2; PVT).
    """

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, *, drop_rate: float, attn_drop_rate: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.attn_drop_rate = attn_drop_rate
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, dim * 2)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        if sr_ratio > 1:
            self.sr = PatchConv(dim, dim, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        K, D = self.num_heads, C // self.num_heads
        q_BKND = self.q(x_BHWC).view(B, H * W, K, D).transpose(1, 2)
        source = self.norm(self.sr(x_BHWC)) if self.sr_ratio > 1 else x_BHWC
        k_BKMD, v_BKMD = self.kv(source).view(B, -1, 2, K, D).permute(2, 0, 3, 1, 4).unbind(0)
        y_BKND = _attend(q_BKND, k_BKMD, v_BKMD, self.attn_drop_rate if self.training else 0.0)
        y_BHWC = y_BKND.transpose(1, 2).reshape(B, H, W, C)
        return self.proj_drop(self.proj(y_BHWC))


class Mlp(nn.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SampleDrop(DropPath):  # type: ignore[misc]  # timm's has no types
    """Drop path that draws in float32 whatever it drops: NPUs draw no bfloat16 numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        kept = torch.empty(shape, device=x.device, dtype=torch.float32).bernoulli_(keep)
        return x * kept.div_(keep).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual around it.

    ``drop_path`` is called twice, for the attention and then for the MLP, with the residual of
    shape (B, H, W, C). The two families list a block's parameters in different orders, and an
    optimizer's state knows parameters by their order.
    """

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        attn: nn.Module,
        *,
        drop_rate: float,
        drop_path: float,
        attn_listed_last: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        if not attn_listed_last:
            self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.mlp = Mlp(dim, mlp_dim, drop_rate)
        if attn_listed_last:
            self.attn = attn
        self.drop_path = SampleDrop(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attn(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


class DepthwiseConv(nn.Conv2d):
    """A depthwise 3 x 3 convolution whose weight's gradient has the weight's own strides.

    In channels-last order the gradient's strides would differ in the dimension of size 1, which
    DistributedDataParallel answers with a warning and a copy.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight.squeeze(1).unsqueeze(1)
        return F.conv2d(x_BCHW, weight, self.bias, padding=1, groups=self.groups)


class PositionalConv(nn.Module):
    """PEG: a depthwise 3 x 3 convolution around which the map is added (CPVT section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(DepthwiseConv(dim))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BCHW = x_BHWC.permute(0, 3, 1, 2)  # a channels-last tensor, no copy
        return (self.proj(x_BCHW) + x_BCHW).permute(0, 2, 3, 1).contiguous()


class PatchEmbed(nn.Module):
    """Patches of s x s pixels or tokens to tokens of the next stage."""

    def __init__(self, in_channels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, dim, stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(self.proj(x_BHWC))


class Twins(nn.Module):
    """Four stages (or fewer) of patch embedding and blocks, mean over tokens, linear head.

    What happens at image sizes that do not divide evenly, as in upstream's convolutions, its
    detection backbone and timm:

    * Pixels, or tokens between stages, that fill no patch are left out, at the bottom and the
      right: 230 x 230 pixels give 57 x 57 tokens from the top left 228 x 228 pixels, and these
      28 x 28 tokens of the next stage.
    * ``WindowAttention`` pads to whole windows, ``GlobalAttention`` leaves out partial patches.

    A new size means new shapes, so compiled and NPU code is built again for it.

    Args:
        num_classes: Length of the logits.
        embed_dims: Channels of each stage; the following five have one entry a stage too.
        num_heads: Attention heads, a divisor of the channels.
        mlp_ratios: Hidden channels of the MLP by channels.
        depths: Blocks.
        sr_ratios: Patch of the global attention's keys, in tokens.
        windows: Window of every other block, in tokens, starting with the first one. None makes
            all blocks global, which is PCPVT.
        patch_size: Patch of the first stage, in pixels; between stages it is 2.
        in_channels: Channels of the images.
        drop_rate: Dropout after patch embeddings, in MLPs and after attention.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 in the first.

    Raises:
        UserError: The lists differ in length, or channels do not divide by heads.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        depths: Sequence[int],
        sr_ratios: Sequence[int],
        windows: Sequence[int] | None,
        patch_size: int = 4,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = [embed_dims, num_heads, mlp_ratios, depths, sr_ratios, windows or depths]
        if len({len(values) for values in per_stage}) > 1:
            raise UserError(
                "embed_dims, num_heads, mlp_ratios, depths, sr_ratios and windows need one entry "
                f"a stage, but have {', '.join(str(len(values)) for values in per_stage)}."
            )
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads:
                raise UserError(f"{dim} channels do not divide by {heads} attention heads.")
        strides = [patch_size * 2**stage for stage in range(len(depths))]
        self.min_image_size = max(s * sr for s, sr in zip(strides, sr_ratios, strict=True))

        self.patch_embeds = nn.ModuleList(
            PatchEmbed(before, dim, patch_size if stage == 0 else 2)
            for stage, (before, dim) in enumerate(pairwise([in_channels, *embed_dims]))
        )
        self.pos_drop = nn.Dropout(drop_rate)
        last = max(sum(depths) - 1, 1)
        blocks = nn.ModuleList()
        for stage, depth in enumerate(depths):
            blocks.append(nn.ModuleList())
            for index in range(depth):
                dim, heads = embed_dims[stage], num_heads[stage]
                dropout = {"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate}
                if windows is not None and index % 2 == 0:
                    attn = WindowAttention(dim, heads, windows[stage], **dropout)
                else:
                    attn = GlobalAttention(dim, heads, sr_ratios[stage], **dropout)
                blocks[stage].append(
                    Block(
                        dim,
                        int(dim * mlp_ratios[stage]),
                        attn,
                        drop_rate=drop_rate,
                        drop_path=drop_path_rate * (sum(depths[:stage]) + index) / last,
                        attn_listed_last=windows is not None,
                    )
                )
        if windows is None:
            self.blocks = blocks
        self.norm = nn.LayerNorm(embed_dims[-1], eps=BLOCK_NORM_EPS)
        self.head = Linear(embed_dims[-1], num_classes)
        self.pos_block = nn.ModuleList(PositionalConv(dim) for dim in embed_dims)
        if windows is not None:
            self.blocks = blocks
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters beside biases and norms that must not decay: the PEG's."""
        return {f"pos_block.{name}" for name, _ in self.pos_block.named_parameters()}

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """The last stage's normalised map, (B, H, W, C), of images (B, 3, H, W).

        Raises:
            UserError: A side of the images is under ``min_image_size`` pixels.
        """
        if min(images_BCHW.shape[-2:]) < self.min_image_size:
            height, width = images_BCHW.shape[-2:]
            raise UserError(
                f"images of {height} x {width} pixels are too small for this network, which "
                f"needs at least {self.min_image_size} pixels a side."
            )
        x_BHWC = images_BCHW.permute(0, 2, 3, 1)
        for embed, peg, blocks in zip(self.patch_embeds, self.pos_block, self.blocks, strict=True):
            x_BHWC = self.pos_drop(embed(x_BHWC))
            for index, block in enumerate(blocks):
                x_BHWC = block(x_BHWC)
                if index == 0:
                    x_BHWC = peg(x_BHWC)
        return self.norm(x_BHWC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, 3, H, W) in any memory format."""
        return self.head(self.forward_features(images_BCHW).mean(dim=(1, 2)))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def _svt(
    num_classes: int,
    embed_dims: Sequence[int],
    num_heads: Sequence[int],
    depths: Sequence[int],
    **options: Any,
) -> Twins:
    return Twins(
        num_classes=num_classes,
        embed_dims=embed_dims,
        num_heads=num_heads,
        mlp_ratios=(4, 4, 4, 4),
        depths=depths,
        sr_ratios=(8, 4, 2, 1),
        windows=(7, 7, 7, 7),
        **options,
    )


def _pcpvt(num_classes: int, depths: Sequence[int], **options: Any) -> Twins:
    return Twins(
        num_classes=num_classes,
        embed_dims=(64, 128, 320, 512),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(8, 8, 4, 4),
        depths=depths,
        sr_ratios=(8, 4, 2, 1),
        windows=None,
        **options,
    )


def alt_gvt_small(num_classes: int, **options: Any) -> Twins:
    """Twins-SVT-S, 24.1 M parameters: the card's network."""
    return _svt(num_classes, (64, 128, 256, 512), (2, 4, 8, 16), (2, 2, 10, 4), **options)


def alt_gvt_base(num_classes: int, **options: Any) -> Twins:
    """Twins-SVT-B, 56.1 M parameters."""
    return _svt(num_classes, (96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 18, 2), **options)


def alt_gvt_large(num_classes: int, **options: Any) -> Twins:
    """Twins-SVT-L, 99.3 M parameters."""
    return _svt(num_classes, (128, 256, 512, 1024), (4, 8, 16, 32), (2, 2, 18, 2), **options)


def pcpvt_small(num_classes: int, **options: Any) -> Twins:
    """Twins-PCPVT-S, 24.1 M parameters."""
    return _pcpvt(num_classes, (3, 4, 6, 3), **options)


def pcpvt_base(num_classes: int, **options: Any) -> Twins:
    """Twins-PCPVT-B, 43.8 M parameters."""
    return _pcpvt(num_classes, (3, 4, 18, 3), **options)


def pcpvt_large(num_classes: int, **options: Any) -> Twins:
    """Twins-PCPVT-L, 61.0 M parameters."""
    return _pcpvt(num_classes, (3, 8, 27, 3), **options)


def alt_gvt_smoke(num_classes: int, **options: Any) -> Twins:
    """A narrow Twins-SVT of our own, 0.4 M parameters: 64 pixels on a CPU, in minutes."""
    return Twins(
        num_classes=num_classes,
        embed_dims=(32, 64, 128),
        num_heads=(1, 2, 4),
        mlp_ratios=(2, 2, 2),
        depths=(2, 2, 2),
        sr_ratios=(4, 2, 1),
        windows=(4, 4, 4),
        **options,
    )


VARIANTS: dict[str, Callable[..., Twins]] = {
    function.__name__: function
    for function in (
        alt_gvt_small,
        alt_gvt_base,
        alt_gvt_large,
        pcpvt_small,
        pcpvt_base,
        pcpvt_large,
        alt_gvt_smoke,
    )
}

# Names that upstream's gvt.py registers, and timm's, for the same networks.
ALIASES = {
    **{f"pcpvt_{size}_v0": f"pcpvt_{size}" for size in ("small", "base", "large")},
    **{f"twins_pcpvt_{size}": f"pcpvt_{size}" for size in ("small", "base", "large")},
    **{f"twins_svt_{size}": f"alt_gvt_{size}" for size in ("small", "base", "large")},
}


def build_model(
    name: str,
    *,
    num_classes: int,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Twins:
    """A network of ``VARIANTS`` (or ``ALIASES``) with fresh weights, in training mode.

    Raises:
        UserError: There is no variant of that name, or no class.
    """
    function = VARIANTS.get(ALIASES.get(name, name))
    if function is None:
        near = difflib.get_close_matches(name, [*VARIANTS, *ALIASES], n=1)
        hint = f"did you mean {near[0]}" if near else f"known are {', '.join(VARIANTS)}"
        raise UserError(f"there is no model {name!r}: {hint}.")
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}, but a classifier needs at least 1 class.")
    return function(
        num_classes,
        drop_rate=drop_rate,
        attn_drop_rate=attn_drop_rate,
        drop_path_rate=drop_path_rate,
    )
