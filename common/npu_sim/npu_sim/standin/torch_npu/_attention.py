"""``npu_fusion_attention`` and its gradient, computed the plain way in float32.

Shapes: B batch, N heads, G heads of key and value, S queries, K keys, D head size. Unlike in
torch's scaled_dot_product_attention, True in a mask means masked out.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from npu_sim import recorded
from npu_sim.npu import _random

_EVERYTHING = 2**31 - 1
_COMPRESSED = (2048, 2048)


class _Call(NamedTuple):
    """Arguments that forward and backward have alike."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: int
    layout: str
    pse: torch.Tensor | None
    mask: torch.Tensor | None
    scale: float
    keep_prob: float
    sparse_mode: int


def _check(
    call: _Call, padding_mask: Any, tokens: tuple[int, int], others: tuple[Any, ...]
) -> None:
    if call.query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise RuntimeError(
            f"npu_fusion_attention takes float16, bfloat16 or float32, but got {call.query.dtype}"
        )
    if {call.key.dtype, call.value.dtype} != {call.query.dtype}:
        raise RuntimeError("npu_fusion_attention takes query, key and value of one dtype")
    if padding_mask is not None:
        raise RuntimeError("npu_fusion_attention takes no padding_mask")
    if call.layout not in ("BSH", "SBH", "BSND", "BNSD", "TND"):
        raise RuntimeError(
            "npu_fusion_attention takes the input_layout BSH, SBH, BSND, BNSD or TND, "
            f"but got {call.layout}"
        )
    if call.mask is not None and call.mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError(
            f"npu_fusion_attention takes a bool or uint8 atten_mask, but got {call.mask.dtype}"
        )
    if not 0 < call.keep_prob <= 1:
        raise RuntimeError(f"keep_prob must be over 0 and at most 1, but got {call.keep_prob}")
    if call.sparse_mode in (2, 3) and (
        call.mask is None or tuple(call.mask.shape[-2:]) != _COMPRESSED
    ):
        raise RuntimeError(
            f"npu_fusion_attention with sparse_mode={call.sparse_mode} takes the compressed "
            "(2048, 2048) atten_mask"
        )
    if call.layout == "TND" or call.sparse_mode not in (0, 1, 2, 3):
        raise recorded.refusal(
            f"npu_fusion_attention with {call.layout} and sparse_mode={call.sparse_mode}"
        )
    if min(tokens) < _EVERYTHING or any(other is not None for other in others):
        raise recorded.refusal("npu_fusion_attention with a window, a prefix, lengths or a sink")


def _split(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """To (B, N, S, D) in float32."""
    values = tensor.float()
    if layout == "BSND":
        return values.transpose(1, 2)
    if layout == "BSH":
        return values.reshape(*values.shape[:2], heads, -1).transpose(1, 2)
    if layout == "SBH":
        return values.reshape(*values.shape[:2], heads, -1).permute(1, 2, 0, 3)
    return values


def _join(values_BNSD: torch.Tensor, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """From (B, N, S, D) back."""
    values = values_BNSD.to(dtype)
    if layout == "BSND":
        values = values.transpose(1, 2)
    elif layout == "BSH":
        values = values.transpose(1, 2).flatten(2)
    elif layout == "SBH":
        values = values.permute(2, 0, 1, 3).flatten(2)
    return values.contiguous()


def _key_heads(call: _Call, size: int) -> int:
    """Heads of key and value, given the head size."""
    if call.layout == "BNSD":
        return call.key.size(1)
    return call.key.size(2) if call.layout == "BSND" else call.key.size(2) // size


def _operands(call: _Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (B, N, S, D), heads of key and value repeated to N."""
    query = _split(call.query, call.layout, call.heads)
    groups = _key_heads(call, query.size(-1))
    key, value = (_split(part, call.layout, groups) for part in (call.key, call.value))
    repeats = call.heads // groups
    return query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _scores(call: _Call, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Masked scores (B, N, S, K)."""
    scores = query @ key.transpose(-1, -2)
    if call.pse is not None:
        scores = scores + call.pse.float()
    scores = scores * call.scale
    rows, columns = scores.shape[-2:]
    mask = None if call.mask is None else call.mask.bool()
    if call.sparse_mode in (2, 3):
        # The compressed mask stands for a causal one, from the top left or the bottom right.
        shift = columns - rows if call.sparse_mode == 3 else 0
        everything = torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
        mask = everything.triu(1 + shift)
    return scores if mask is None else scores.masked_fill(mask, torch.finfo(torch.float32).min)


def _dropout(probabilities: torch.Tensor, keep_prob: float, seed: int) -> torch.Tensor:
    """Factors 0 and 1 / keep_prob; the seed lets the gradient draw the same."""
    generator = torch.Generator(probabilities.device).manual_seed(seed)
    drawn = torch.rand(probabilities.shape, device=probabilities.device, generator=generator)
    return (drawn < keep_prob).float() / keep_prob


def _draw_seed(device: torch.device) -> int:
    """The next seed of the card's generator, without waiting for the card."""
    seed = zlib.crc32(_random.get_rng_state(device).numpy().tobytes())
    torch.rand((), device=device)
    return seed


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _EVERYTHING,
    next_tockens: int = _EVERYTHING,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    """Attention.

    Returns:
        The result in the layout of ``query``; largest score and sum of exponentials, both
        (B, N, S, 8) in float32 with 8 equal columns; an empty tensor; and the three numbers by
        which the gradient draws the same dropout.
    """
    call = _Call(
        query, key, value, head_num, input_layout, pse, atten_mask, scale, keep_prob, sparse_mode
    )
    others = (prefix, actual_seq_qlen, actual_seq_kvlen, sink, dropout_mask)
    _check(call, padding_mask, (pre_tockens, next_tockens), others)
    queries, keys, values = _operands(call)
    scores = _scores(call, queries, keys)
    highest = scores.amax(-1, keepdim=True)
    exponentials = torch.exp(scores - highest)
    total = exponentials.sum(-1, keepdim=True)
    probabilities = exponentials / total
    numels = 0
    if keep_prob < 1:
        seed = _draw_seed(query.device)
        numels = probabilities.numel()
        probabilities = probabilities * _dropout(probabilities, keep_prob, seed)
    result = _join(probabilities @ values, input_layout, query.dtype)
    columns = (*highest.shape[:-1], 8)
    return (
        result,
        highest.expand(columns).contiguous(),
        total.expand(columns).contiguous(),
        result.new_empty(0),
        seed if numels else 0,
        0,
        numels,
    )


def _over_groups(grads: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums gradients (B, N, K, D) over the heads that share a key, to (B, G, K, D)."""
    return grads.reshape(grads.size(0), groups, -1, *grads.shape[2:]).sum(2)


def npu_fusion_attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    softmax_max: torch.Tensor | None = None,
    softmax_sum: torch.Tensor | None = None,
    softmax_in: torch.Tensor | None = None,
    attention_in: torch.Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _EVERYTHING,
    next_tockens: int = _EVERYTHING,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, pse and sink; the last two are empty when there are none."""
    if softmax_max is None or softmax_sum is None:
        raise RuntimeError("npu_fusion_attention_grad takes softmax_max and softmax_sum")
    call = _Call(
        query,
        key,
        value,
        head_num,
        input_layout,
        pse,
        atten_mask,
        scale_value,
        keep_prob,
        sparse_mode,
    )
    others = (prefix, actual_seq_qlen, actual_seq_kvlen, sink)
    _check(call, padding_mask, (pre_tockens, next_tockens), others)
    queries, keys, values = _operands(call)
    scores = _scores(call, queries, keys)
    probabilities = torch.exp(scores - softmax_max[..., :1]) / softmax_sum[..., :1]
    grad = _split(dy, input_layout, head_num)
    factors = _dropout(probabilities, keep_prob, seed) if numels else torch.ones_like(scores)
    of_values = (probabilities * factors).transpose(-1, -2) @ grad
    of_probabilities = grad @ values.transpose(-1, -2) * factors
    of_scores = of_probabilities - (of_probabilities * probabilities).sum(-1, keepdim=True)
    of_scores = of_scores * probabilities * scale_value
    groups = _key_heads(call, queries.size(-1))
    of_keys = of_scores.transpose(-1, -2) @ queries
    nothing = query.new_empty(0)
    of_pse = nothing if pse is None else of_scores.sum_to_size(pse.shape).to(pse.dtype)
    return (
        _join(of_scores @ keys, input_layout, query.dtype),
        _join(_over_groups(of_keys, groups), input_layout, key.dtype),
        _join(_over_groups(of_values, groups), input_layout, value.dtype),
        of_pse,
        nothing.clone(),
    )


# Positions among the arguments of npu_fusion_attention.
_PSE, _MASK, _SCALE, _KEEP, _SPARSE = 5, 7, 8, 9, 16


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    query, key, value, ctx.heads, ctx.layout = inputs[:5]
    ctx.save_for_backward(
        query, key, value, inputs[_PSE], inputs[_MASK], output[0], output[1], output[2]
    )
    ctx.mark_non_differentiable(output[1], output[2], output[3])
    ctx.set_materialize_grads(False)
    ctx.numbers = {
        "scale_value": inputs[_SCALE],
        "keep_prob": inputs[_KEEP],
        "sparse_mode": inputs[_SPARSE],
        "seed": output[4],
        "offset": output[5],
        "numels": output[6],
    }


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    query, key, value, pse, mask, result, highest, total = ctx.saved_tensors
    of_query, of_key, of_value, of_pse, _sink = torch.ops.npu.npu_fusion_attention_grad(
        query,
        key,
        value,
        grad,
        ctx.heads,
        ctx.layout,
        pse=pse,
        atten_mask=mask,
        softmax_max=highest,
        softmax_sum=total,
        attention_in=result,
        **ctx.numbers,
    )
    nothing = [None] * 18
    return of_query, of_key, of_value, None, None, None if pse is None else of_pse, *nothing


KERNELS: dict[str, Any] = {
    "npu_fusion_attention": npu_fusion_attention,
    "npu_fusion_attention_grad": npu_fusion_attention_grad,
}
GRADIENTS: dict[str, Any] = {"npu_fusion_attention": (_backward, _setup)}
