"""What torch_npu computes with operators of its own (npu::...), as far as the zoo comes by it.

The kernels of PyTorch's operators are replaced by csrc/kernels.cpp, in general. These have no CPU
kernel anywhere, so each is written here as what its documentation says, out of other operators
that run on the card themselves. :data:`REPLACED` is all there is, with the reasons.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Replaced(NamedTuple):
    """An operator that is computed here.

    Attributes:
        operator: its name in the dispatcher.
        compute: what computes it.
        differentiable: torch's own autograd differentiates ``compute``; torch_npu's formula for
            the operator calls CANN directly.
        reason: why it is needed.
    """

    operator: str
    compute: Callable[..., Any]
    differentiable: bool
    reason: str


def _same(tensor: Tensor, *arguments: object, **options: object) -> Tensor:
    return tensor


def _per_channel(x_NCHW: Tensor, value_C: Tensor) -> Tensor:
    return value_C.reshape(1, -1, *[1] * (x_NCHW.dim() - 2))


def _other_axes(x_NCHW: Tensor) -> list[int]:
    return [axis for axis in range(x_NCHW.dim()) if axis != 1]


def _batch_norm_stats(x_NCHW: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x_NCHW.float()
    variance, mean = torch.var_mean(x, _other_axes(x), correction=0)
    return mean, torch.rsqrt(variance + eps)


def _batch_norm_gather_stats_with_counts(
    x_NCHW: Tensor,
    mean_RC: Tensor,
    inverse_std_RC: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    count_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation over all ranks ``R``; updates the running ones."""
    share_R1 = (count_R / count_R.sum()).reshape(-1, 1)
    mean = (mean_RC * share_R1).sum(0)
    variance_RC = inverse_std_RC.pow(-2) - eps
    variance = ((variance_RC + (mean_RC - mean).square()) * share_R1).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        unbiased = variance * count_R.sum() / (count_R.sum() - 1)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return mean, torch.rsqrt(variance + eps)


def _batch_norm_elemt(
    x_NCHW: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    eps: float,
) -> Tensor:
    x = (x_NCHW.float() - _per_channel(x_NCHW, mean)) * _per_channel(x_NCHW, inverse_std)
    if weight is not None:
        x = x * _per_channel(x, weight)
    if bias is not None:
        x = x + _per_channel(x, bias)
    return x.to(x_NCHW.dtype)


def _batch_norm_backward_reduce(
    grad_NCHW: Tensor,
    x_NCHW: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = grad_NCHW.float()
    centred = x_NCHW.float() - _per_channel(x_NCHW, mean)
    grad_sum = grad.sum(_other_axes(grad))
    grad_centred_sum = (grad * centred).sum(_other_axes(grad))
    return grad_sum, grad_centred_sum, grad_centred_sum * inverse_std, grad_sum.clone()


def _batch_norm_backward_elemt(
    grad_NCHW: Tensor,
    x_NCHW: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    grad_centred_sum: Tensor,
    count: Tensor,
) -> Tensor:
    total = count.sum()
    x = x_NCHW.float()
    factor = inverse_std if weight is None else inverse_std * weight
    slope = inverse_std * inverse_std * grad_centred_sum / total
    centred = x - _per_channel(x, mean)
    grad = grad_NCHW.float() - _per_channel(x, grad_sum / total) - centred * _per_channel(x, slope)
    return (grad * _per_channel(x, factor)).to(x_NCHW.dtype)


def _fusion_attention_v3(
    query_BNLE: Tensor,
    key_BNSE: Tensor,
    value_BNSE: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0,
    *ignored: object,
) -> tuple[Tensor, ...]:
    """Attention; ``atten_mask`` is True where a key is hidden, the opposite of PyTorch's.

    Returns what the operator returns: the result, and five that only its own backward reads.
    """
    if input_layout != "BNSD" or pse is not None or sparse_mode not in (0, 2):
        raise NotImplementedError(
            f"npu_fusion_attention_v3 with {input_layout=}, {sparse_mode=}, {pse=}: no stand-in."
        )
    scores = (query_BNLE @ key_BNSE.transpose(-2, -1)).float() * scale
    if atten_mask is not None:
        hidden = atten_mask
        if sparse_mode == 2:  # a causal mask of 2048 x 2048 for any length
            hidden = atten_mask[: scores.shape[-2], : scores.shape[-1]]
        scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.dropout(scores.softmax(-1), 1 - keep_prob, train=keep_prob < 1)
    unused = query_BNLE.new_empty(0, dtype=torch.float32)
    result = weights.to(value_BNSE.dtype) @ value_BNSE
    return result, unused, unused.clone(), unused.clone(), unused.clone(), unused.clone()


_FORMAT = "Private layouts are CANN's; without them every tensor keeps the plain one."
_SYNC = "torch's SyncBatchNorm computes with it; the CPU has no kernel."
_CAST = "ProcessGroupHCCL makes int32 of bool and uint8 with it, which it cannot reduce."

REPLACED = (
    Replaced("npu::npu_format_cast", _same, True, _FORMAT),
    Replaced("npu::_npu_format_cast", _same, True, _FORMAT),
    Replaced("npu::npu_format_cast_.acl_format", _same, True, _FORMAT),
    Replaced("npu::_npu_dtype_cast", torch.Tensor.to, True, _CAST),
    Replaced("aten::batch_norm_stats", _batch_norm_stats, False, _SYNC),
    Replaced(
        "aten::batch_norm_gather_stats_with_counts",
        _batch_norm_gather_stats_with_counts,
        False,
        _SYNC,
    ),
    Replaced("aten::batch_norm_elemt", _batch_norm_elemt, False, _SYNC),
    Replaced("aten::batch_norm_backward_reduce", _batch_norm_backward_reduce, False, _SYNC),
    Replaced("aten::batch_norm_backward_elemt", _batch_norm_backward_elemt, False, _SYNC),
    Replaced(
        "npu::npu_fusion_attention_v3",
        _fusion_attention_v3,
        True,
        "torch_npu's scaled_dot_product_attention, which is its own real code, computes with it.",
    ),
)

_libraries: list[torch.library.Library] = []
"""Registrations last as long as these."""


def install() -> None:
    """Registers what :data:`REPLACED` lists; torch_npu must be imported."""
    for replaced in REPLACED:
        namespace, name = replaced.operator.split("::")
        keys = ["PrivateUse1", *(["AutogradPrivateUse1"] if replaced.differentiable else [])]
        for key in keys:
            library = torch.library.Library(namespace, "IMPL", key)  # type: ignore[no-untyped-call]
            library.impl(name, replaced.compute)  # type: ignore[no-untyped-call]
            _libraries.append(library)
