"""The stand-in's reference kernels against plain torch on the CPU, with their gradients."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the stand-in: python -m npu_sim pytest", allow_module_level=True)

import torch_npu
import torchvision

import npu_sim

pytestmark = pytest.mark.device

COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(function: Callable[..., Any], plain: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Results and gradients of the NPU's operator and of torch's own operations."""
    results = []
    for device, call in (("npu", function), ("cpu", plain)):
        leaves = [value.to(device).requires_grad_() for value in inputs]
        result = call(*leaves)
        weights = draw(*result.shape, seed=9).to(device)
        grads = torch.autograd.grad((result * weights).sum(), leaves)
        results.append([result.detach().cpu(), *(grad.cpu() for grad in grads)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rms_norm() -> None:
    def plain(values: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(values, gamma.shape, gamma, 1e-3)

    compare(lambda x, g: torch_npu.npu_rms_norm(x, g, 1e-3)[0], plain, draw(3, 4, 6), draw(6))
    compare(lambda x, g: torch_npu.npu_rms_norm(x, g, 1e-3)[0], plain, draw(3, 4, 6), draw(4, 6))
    values = draw(3, 6).npu().half()
    result, rstd = torch_npu.npu_rms_norm(values, torch.ones(6).npu().half())
    assert (result.dtype, rstd.dtype, rstd.shape) == (torch.float16, torch.float32, (3, 1))


@pytest.mark.parametrize("dim", [-1, 1])
def test_swiglu(dim: int) -> None:
    def plain(values: torch.Tensor) -> torch.Tensor:
        first, second = values.chunk(2, dim)
        return functional.silu(first) * second

    compare(lambda x: torch_npu.npu_swiglu(x, dim), plain, draw(2, 4, 6))
    with pytest.raises(RuntimeError, match="even size in dim 1, but got 3"):
        torch_npu.npu_swiglu(draw(2, 3).npu(), 1)


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_positions(mode: str) -> None:
    """A pair of values as a complex number, turned by an angle."""

    def plain(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if mode == "half":
            values = values.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        pairs = values.unflatten(-1, (-1, 2))
        swapped = torch.stack((-pairs[..., 1], pairs[..., 0]), -1)
        if mode == "half":
            pairs, swapped = (part.transpose(-1, -2) for part in (pairs, swapped))
        return pairs.flatten(-2) * cos + swapped.flatten(-2) * sin

    inputs = draw(2, 3, 5, 8), draw(1, 1, 5, 8, seed=1), draw(1, 1, 5, 8, seed=2)
    compare(lambda *x: torch_npu.npu_rotary_mul(*x, mode), plain, *inputs)


def test_rotary_positions_refuse() -> None:
    values = draw(2, 3, 5, 8).npu()
    for wrong in (values[0], values[..., :7], draw(1, 1, 1, 896).npu()):
        with pytest.raises(RuntimeError, match="takes a 4-D input"):
            torch_npu.npu_rotary_mul(wrong, wrong, wrong)
    with pytest.raises(RuntimeError, match="half or interleave, but got quarter"):
        torch_npu.npu_rotary_mul(values, values, values, "quarter")


def to_layout(values: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "BNSD":
        return values
    if layout == "BSND":
        return values.transpose(1, 2)
    joined = values.transpose(1, 2).flatten(2)
    return joined if layout == "BSH" else joined.transpose(0, 1)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("groups", [4, 2])
def test_fusion_attention(layout: str, groups: int) -> None:
    masked = draw(2, 1, 5, 7, seed=5) > 0.5
    pse = draw(2, 4, 5, 7, seed=4)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        parts = (to_layout(part, layout) for part in (q, k, v))
        options = {"pse": p, "atten_mask": masked.npu(), "scale": 0.3}
        return torch_npu.npu_fusion_attention(*parts, 4, layout, **options)[0]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        bias = (p * 0.3).masked_fill(masked, -torch.inf)
        result = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=0.3, enable_gqa=True
        )
        return to_layout(result, layout)

    keys, values = draw(2, groups, 7, 8, seed=1), draw(2, groups, 7, 8, seed=2)
    compare(fused, plain, draw(2, 4, 5, 8), keys, values, pse)


@pytest.mark.parametrize(("mode", "shift"), [(2, 0), (3, 2)])
def test_fusion_attention_with_a_compressed_mask(mode: int, shift: int) -> None:
    """Mode 2 counts the diagonal from the top left, mode 3 from the bottom right."""
    allowed = torch.ones(5, 7, dtype=torch.bool).tril(shift)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        options = {"atten_mask": COMPRESSED.npu(), "sparse_mode": mode}
        return torch_npu.npu_fusion_attention(q, k, v, 2, "BNSD", **options)[0]

    def plain(*operands: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*operands, attn_mask=allowed, scale=1.0)

    compare(fused, plain, draw(1, 2, 5, 8), draw(1, 2, 7, 8, seed=1), draw(1, 2, 7, 8, seed=2))


def test_fusion_attention_returns_what_its_gradient_takes() -> None:
    query = draw(1, 2, 3, 8).npu()
    result = torch_npu.npu_fusion_attention(query, query, query, 2, "BNSD", scale=0.5)
    scores = (query @ query.transpose(-1, -2) * 0.5).cpu()
    assert result[1].shape == result[2].shape == (1, 2, 3, 8)
    torch.testing.assert_close(result[1][..., 3].cpu(), scores.amax(-1))
    total = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(result[2][..., 3].cpu(), total)
    assert (result[3].numel(), *result[4:]) == (0, 0, 0, 0)


def test_fusion_attention_with_dropout() -> None:
    """With a unit matrix as value the result shows what is dropped; the gradient drops it too."""
    torch.npu.manual_seed(1)
    query, key = (draw(1, 2, 16, 16, seed=seed) for seed in (0, 1))
    operands = [query, key, torch.eye(16).expand(1, 2, 16, 16)]
    leaves = [part.clone().npu().requires_grad_() for part in operands]
    with npu_sim.record() as recording:
        result = torch_npu.npu_fusion_attention(*leaves, 2, "BNSD", keep_prob=0.5)[0]
    assert recording.syncs == []
    again = torch_npu.npu_fusion_attention(*leaves, 2, "BNSD", keep_prob=0.5)[0]
    assert not torch.equal(result, again)
    kept = (result != 0).float().detach().cpu() * 2
    assert 0.8 < kept.mean() < 1.2

    plain = [part.clone().requires_grad_() for part in operands]
    probabilities = (plain[0] @ plain[1].transpose(-1, -2)).softmax(-1)
    expected = (probabilities * kept) @ plain[2]
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-5)
    weights = draw(1, 2, 16, 16, seed=4)
    ours = torch.autograd.grad((result * weights.npu()).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), plain)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


def test_fusion_attention_refuses() -> None:
    query = draw(1, 2, 3, 8).npu()

    def call(**options: Any) -> None:
        torch_npu.npu_fusion_attention(query, query, query, 2, **{"input_layout": "BNSD"} | options)

    for message, options in {
        "bool or uint8 atten_mask": {"atten_mask": torch.zeros(3, 3).npu()},
        "takes no padding_mask": {"padding_mask": torch.zeros(3, 3).npu()},
        "BNSD or TND, but got BNDS": {"input_layout": "BNDS"},
        "keep_prob must be over 0": {"keep_prob": 0.0},
        r"compressed \(2048, 2048\)": {
            "sparse_mode": 2,
            "atten_mask": torch.zeros(3, 3, dtype=torch.bool).npu(),
        },
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**options)
    with pytest.raises(RuntimeError, match="float16, bfloat16 or float32"):
        torch_npu.npu_fusion_attention(*[query.double()] * 3, 2, "BNSD")
    for options in ({"input_layout": "TND"}, {"sparse_mode": 4}, {"pre_tockens": 4}):
        with pytest.raises(NotImplementedError, match="does not simulate npu_fusion_attention"):
            call(**options)


def test_casts() -> None:
    values = draw(2, 3).npu().requires_grad_()
    for half in (torch.float16, torch_npu.float16):
        cast = torch_npu.npu_dtype_cast(values, half)
        assert cast.dtype is torch.float16
        (grad,) = torch.autograd.grad(cast.sum(), [values])
        assert grad.dtype is torch.float32
    with pytest.raises(NotImplementedError, match="dtype number 290"):
        torch_npu.npu_dtype_cast(values, torch_npu.hifloat8)


def test_formats() -> None:
    values = draw(2, 3, 4, 4).npu()
    assert torch_npu.get_npu_format(values) is torch_npu.Format.ND
    assert torch.equal(torch_npu.npu_format_cast(values, torch_npu.Format.NCHW), values)
    with pytest.warns(UserWarning, match="created with base format"):
        cast = torch_npu.npu_format_cast(values, torch_npu.Format.FRACTAL_NZ)
    assert torch_npu.get_npu_format(cast) is torch_npu.Format.ND
    torch.npu.config.allow_internal_format = True
    try:
        with pytest.raises(NotImplementedError, match="layout FRACTAL_NZ"):
            torch_npu.npu_format_cast(values, 29)
    finally:
        torch.npu.config.allow_internal_format = False
    with pytest.raises(NotImplementedError, match="with arguments from the 'CPU' backend"):
        torch_npu.npu_format_cast(values.cpu(), 2)


def test_iou() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [32, 32, 38, 42]])
    others = torch.tensor([[0.0, 0, 10, 20], [0, 10, 10, 10], [10, 10, 20, 20], [1, 1, 9, 9]])
    found = torch_npu.npu_iou(boxes.npu(), others.npu()).cpu()
    torch.testing.assert_close(found, torchvision.ops.box_iou(others, boxes))
    part = torch_npu.npu_iou(boxes.npu(), others.npu(), 1).cpu()
    assert part[:, 0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.64])
    with pytest.raises(RuntimeError, match="mode must be 0"):
        torch_npu.npu_iou(boxes.npu(), boxes.npu(), 2)


def test_nms() -> None:
    corners = draw(60, 2).abs() * 20
    boxes = torch.cat((corners, corners + 5 + draw(60, 2, seed=1).abs() * 10), 1)
    scores = draw(60, seed=2).sigmoid()
    thresholds = torch.tensor(0.4).npu(), torch.tensor(0.3).npu()
    kept, count = torch_npu.npu_nms_v4(boxes.npu(), scores.npu(), 50, *thresholds)
    expected = torchvision.ops.nms(boxes, scores, 0.4)
    expected = expected[scores[expected] > 0.3]
    assert kept.tolist() == expected.tolist() and int(count) == len(expected) > 3
    assert kept.dtype is count.dtype is torch.int32
    kept, count = torch_npu.npu_nms_v4(boxes.npu(), scores.npu(), 3, *thresholds)
    assert kept.tolist() == expected[:3].tolist() and int(count) == 3
    padded, count = torch_npu.npu_nms_v4(boxes.npu(), scores.npu(), 50, *thresholds, True)
    assert padded.shape == (50,) and int(count) == len(expected)


def test_batch_norm_over_ranks() -> None:
    """Two halves of a batch, as on two ranks, give the statistics of the whole."""
    images = draw(6, 3, 4, 5) * 2 + 1
    whole = torch.nn.BatchNorm2d(3)
    normed = whole(images)
    parts = [images[:2].npu(), images[2:].npu()]
    sums = [torch_npu.batch_norm_reduce(part, 1e-5) for part in parts]
    counts = torch.tensor([part.numel() / 3 for part in parts]).npu()
    mean, var = torch.zeros(3).npu(), torch.ones(3).npu()
    average, inverse = torch_npu.batch_norm_gather_stats_update(
        parts[0],
        torch.stack([total for total, _ in sums]),
        torch.stack([squares for _, squares in sums]),
        mean,
        var,
        0.1,
        1e-5,
        counts,
    )
    torch.testing.assert_close(mean.cpu(), whole.running_mean)
    torch.testing.assert_close(var.cpu(), whole.running_var)
    ours = (images - average.cpu()[:, None, None]) * inverse.cpu()[:, None, None]
    torch.testing.assert_close(ours, normed.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="takes a 4-D input, but got 2-D"):
        torch_npu.batch_norm_reduce(images[:, 0, 0].npu(), 1e-5)


def test_wrong_arguments_fail_as_on_the_real_one() -> None:
    values = draw(2, 4).npu()
    with pytest.raises(RuntimeError, match=r"Unknown keyword argument 'eps'.*npu_rms_norm"):
        torch_npu.npu_rms_norm(values, values[0], eps=1e-6)
    with pytest.raises(RuntimeError, match="missing value for argument 'gamma'"):
        torch_npu.npu_rms_norm(values)
    with pytest.raises(RuntimeError, match=r"torch\.npu_rms_norm is deprecated.*torch_npu\.npu"):
        torch.npu_rms_norm(values, values[0])


def test_a_recording_shows_them_as_one_operator() -> None:
    values, gamma = draw(2, 4).npu().requires_grad_(), torch.ones(4).npu()
    with npu_sim.record() as recording:
        torch_npu.npu_rms_norm(values, gamma)[0].sum().backward()
    names = [operator.name for operator in recording.operators]
    assert "npu::npu_rms_norm" in names and "npu::npu_rms_norm_backward" in names
    assert "aten::rsqrt" not in names
    first = recording.operators[names.index("npu::npu_rms_norm")]
    assert first.inputs == (("float32", (2, 4)), ("float32", (4,)))
    assert first.outputs == (("float32", (2, 4)), ("float32", (2, 1)))
