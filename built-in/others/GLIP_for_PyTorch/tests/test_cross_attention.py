"""The core of the fusion: what the paper's formula says, on each way that a device takes."""

import math
from functools import partial

import pytest
import torch
from detector_runs import DEVICE
from torch import Tensor

from glip import cross_attention, fusion
from glip.cross_attention import LIMIT, WordSide, read_at_once, read_both_ways
from glip.fusion import BiMultiHeadAttention
from zoo_common import device
from zoo_common.detection import ops

pytestmark = pytest.mark.device

WHERE = device.resolve(DEVICE)
EXACT = torch.float64 if WHERE.type == "cpu" else torch.float32
NEAR = {"rtol": 1e-9, "atol": 1e-11} if WHERE.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
CELLS, TOKENS, WIDTH, WORDS, HEADS = 37, 9, 12, 10, 4


def build(dropout: float = 0.0) -> BiMultiHeadAttention:
    torch.manual_seed(0)
    layer = BiMultiHeadAttention(WIDTH, WORDS, 24, HEADS, dropout)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.5)  # biases, too
    return layer.to(WHERE, EXACT)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Cells, words and mask; of the second caption most is padding."""
    torch.manual_seed(1)
    cells_BNV, words_BTL = torch.randn(2, CELLS, WIDTH), torch.randn(2, TOKENS, WORDS)
    mask_BT = torch.arange(TOKENS) < torch.tensor([[TOKENS], [3]])
    moved = (part.to(WHERE, EXACT).requires_grad_() for part in (cells_BNV, words_BTL))
    return *moved, mask_BT.to(WHERE)  # type: ignore[return-value]


def by_formula(
    layer: BiMultiHeadAttention, cells_BNV: Tensor, words_BTL: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """With queries, keys and values, as the paper and upstream have it."""

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(2, (HEADS, -1)).transpose(1, 2)

    queries, keys = split(layer.v_proj(cells_BNV)), split(layer.l_proj(words_BTL))
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[3])
    scores = scores.clamp(-LIMIT, LIMIT)
    rows = scores.masked_fill(~mask_BT[:, None, None], -math.inf).softmax(dim=3)
    columns = scores.transpose(2, 3).softmax(dim=3)
    added_v = rows @ split(layer.values_l_proj(words_BTL))
    added_l = columns @ split(layer.values_v_proj(cells_BNV))
    return (
        layer.out_v_proj(added_v.transpose(1, 2).flatten(2)),
        layer.out_l_proj(added_l.transpose(1, 2).flatten(2)),
    )


WAYS = {"as the device has it": read_both_ways, "at once": read_at_once}


@pytest.mark.parametrize("loud", [1.0, 1e5], ids=["usual", "beyond the limit"])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_formula_with_its_gradients(
    way: str, loud: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "read_both_ways", WAYS[way])
    layer = build()
    layer.v_proj.weight.data *= loud
    found = []
    for compute in (layer, partial(by_formula, layer)):
        given = inputs()
        outputs = compute(*given)
        layer.zero_grad()
        sum((output * output.cos()).sum() for output in outputs).backward()
        gradients = {name: one.grad for name, one in layer.named_parameters()}
        found.append([*outputs, given[0].grad, given[1].grad, gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **NEAR)


def test_what_accelerators_run_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_attention, "read_at_once", lambda *_: "at once")
    with ops.implementation("reference"):
        assert read_both_ways(*side(), 0.0) == "at once"


def side(dtype: torch.dtype = torch.float64) -> tuple[Tensor, WordSide]:
    torch.manual_seed(2)
    keys, values = torch.randn(2, 2, HEADS, TOKENS, WIDTH, dtype=dtype)
    cells = torch.randn(2, CELLS, WIDTH, dtype=dtype)
    bias = torch.randn(2, HEADS, TOKENS, dtype=dtype)
    return cells, WordSide(keys, bias, values, inputs()[2].cpu())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_what_was_computed_and_dropped(dropout: float) -> None:
    cells, (keys, bias, values, mask) = side()

    def compute(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        return read_both_ways(given[0], WordSide(*given[1:], mask), dropout)

    given = [one.requires_grad_() for one in (cells, keys, bias, values)]
    assert torch.autograd.gradcheck(compute, given, fast_mode=True)


def test_dropout_drops_the_share_asked_for_and_keeps_the_mean() -> None:
    cells, words = (part.to(WHERE) if isinstance(part, Tensor) else part for part in side(EXACT))
    words = WordSide(*(part.to(WHERE) for part in words))
    torch.manual_seed(4)
    many = [read_both_ways(cells, words, 0.5) for _ in range(400)]
    for outputs, whole in zip(
        zip(*many, strict=True), read_both_ways(cells, words, 0.0), strict=True
    ):
        drawn = torch.stack(outputs)
        spread = drawn.std(dim=0) / math.sqrt(len(many))
        assert (drawn[0] - whole).abs().max() > 0.01
        assert ((drawn.mean(dim=0) - whole).abs() <= 6 * spread + 1e-6).all()
    sums = torch.stack([sums for *_, sums in many])
    assert 0.9 < sums.mean() < 1.1


def test_half_precision_is_near() -> None:
    layer = build().float()
    given = [part.detach().float() if part.is_floating_point() else part for part in inputs()]
    whole = layer(*given)
    with torch.autocast(WHERE.type, torch.bfloat16):
        half = layer(*given)
    for one, other in zip(half, whole, strict=True):
        assert not torch.equal(one.float(), other)
        assert (one - other).abs().max() < 0.05 * other.abs().max()
