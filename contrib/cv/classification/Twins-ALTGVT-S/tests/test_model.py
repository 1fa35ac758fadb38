"""The networks: equal to timm's, at any size, in any precision, without graph breaks."""

import os

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.twins import Twins as TimmTwins
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from twins.model import ALIASES, VARIANTS, Twins, build_model
from twins.recipe import build_optimizer
from zoo_common import device
from zoo_common.errors import UserError

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
# HCCL and the NPU's kernels have no float64.
DTYPE, TOLERANCE = (torch.float32, 1e-3) if DEVICE.type == "npu" else (torch.float64, 1e-10)

PUBLISHED = {
    "alt_gvt_small": ("twins_svt_small", 24_060_776),
    "alt_gvt_base": ("twins_svt_base", 56_070_952),
    "alt_gvt_large": ("twins_svt_large", 99_271_400),
    "pcpvt_small": ("twins_pcpvt_small", 24_106_216),
    "pcpvt_base": ("twins_pcpvt_base", 43_828_456),
    "pcpvt_large": ("twins_pcpvt_large", 60_989_672),
}
NARROW = {
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (4, 3, 2, 2),
    "depths": (2, 1, 2, 2),
    "sr_ratios": (8, 4, 2, 1),
}


def narrow_pair(windows: tuple[int, ...] | None) -> tuple[Twins, TimmTwins]:
    """Ours and timm's on the CPU with the same random weights, norms and biases included."""
    theirs = TimmTwins(num_classes=5, wss=windows, **NARROW)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2, generator=generator)
    ours = Twins(num_classes=5, windows=windows, **NARROW)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def small_model(num_classes: int) -> Twins:
    """Wide enough to learn, with fresh weights."""
    return Twins(
        num_classes=num_classes,
        embed_dims=(32, 64, 128, 256),
        num_heads=(1, 2, 4, 8),
        mlp_ratios=(3, 3, 3, 3),
        depths=(2, 2, 2, 2),
        sr_ratios=(4, 2, 1, 1),
        windows=(4, 4, 4, 2),
    )


def random_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    difference = ours.detach().cpu().double() - theirs.detach().cpu().double()
    return (difference.abs().max() / theirs.detach().abs().max()).item()


def assert_same_training(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    """Same logits and gradients as the reference, which runs in float64 on the CPU."""
    ours.to(DEVICE, DTYPE)
    expected = theirs.double()(images.double())
    logits = ours(images.to(DEVICE, DTYPE))
    assert relative(logits, expected) < TOLERANCE
    expected.square().sum().backward()
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad.cpu().double() - gradients[name]).abs().max()
        assert difference / largest < TOLERANCE, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_network(name: str) -> None:
    timm_name, count = PUBLISHED[name]
    with torch.device("meta"):
        ours = build_model(name, num_classes=1000)
        theirs = timm.create_model(timm_name)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert ALIASES[timm_name] == name


def test_order_of_parameters_is_upstreams() -> None:
    """An optimizer's state knows parameters by their place, so a checkpoint needs the order."""
    svt = [name for name, _ in Twins(num_classes=5, windows=(7,) * 4, **NARROW).named_parameters()]
    groups = list(dict.fromkeys(name.partition(".")[0] for name in svt))
    assert groups == ["patch_embeds", "norm", "head", "pos_block", "blocks"]
    block = [name.removeprefix("blocks.0.1.") for name in svt if name.startswith("blocks.0.1.")]
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in block))
    attention = ["attn.q", "attn.kv", "attn.proj", "attn.sr", "attn.norm"]
    assert parts == ["norm1", "norm2", "mlp.fc1", "mlp.fc2", *attention]

    pcpvt = [name for name, _ in Twins(num_classes=5, windows=None, **NARROW).named_parameters()]
    groups = list(dict.fromkeys(name.partition(".")[0] for name in pcpvt))
    assert groups == ["patch_embeds", "blocks", "norm", "head", "pos_block"]
    block = [name.removeprefix("blocks.0.1.") for name in pcpvt if name.startswith("blocks.0.1.")]
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in block))
    assert parts == ["norm1", *attention, "norm2", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("windows", [(7, 7, 7, 7), (4, 3, 5, 2), None])
@pytest.mark.parametrize(
    "size",
    [
        (64, 96),  # windows larger than the map
        (200, 264),  # divides by the patch, by no window and by no later patch
        (230, 225),  # pixels are left out
        (448, 416),  # more keys than the CPU's plain attention takes
    ],
)
def test_same_as_timm_at_any_size(windows: tuple[int, ...] | None, size: tuple[int, int]) -> None:
    assert_same_training(*narrow_pair(windows), random_images(2, 3, *size))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_is_the_same_as_timms(name: str) -> None:
    theirs = timm.create_model(PUBLISHED[name][0])
    ours = build_model(name, num_classes=1000)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_training(ours, theirs, random_images(1, 3, 224, 224))


def test_float32_is_as_exact_as_float32_allows() -> None:
    ours, theirs = narrow_pair((7, 7, 7, 7))
    images = random_images(4, 3, 224, 224)
    logits = ours.to(DEVICE)(images.to(DEVICE))
    expected = theirs.double()(images.double())
    assert relative(logits, expected) < 3e-6
    logits.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad.cpu() - gradients[name]).abs().max() < 1e-5 * largest, name


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    model = small_model(num_classes=5).to(DEVICE).eval()
    images = random_images(5, 3, 72, 64).to(DEVICE)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert relative(alone, together) < 1e-5


def test_memory_format_of_the_images_does_not_matter() -> None:
    model = small_model(num_classes=5).to(DEVICE).eval()
    images = random_images(2, 3, 64, 64).to(DEVICE)
    with torch.no_grad():
        plain = model(images)
        channels_last = model(images.contiguous(memory_format=torch.channels_last))
    assert relative(channels_last, plain) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_norms_in_float32(dtype: torch.dtype) -> None:
    """What opt level O2 does: half weights and activations, norms hooked to compute in float32."""
    torch.manual_seed(0)
    model = small_model(num_classes=5).to(DEVICE)
    images = random_images(4, 3, 64, 64).to(DEVICE)
    expected = model(images)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    called = set()
    model.to(dtype)
    for norm in norms:
        norm.float()
        norm.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        norm.register_forward_hook(
            lambda module, args, output: called.add(module) or output.to(dtype)
        )
    logits = model(images.to(dtype))
    assert logits.dtype == dtype
    assert called == set(norms)
    assert relative(logits, expected) < (0.03 if dtype == torch.bfloat16 else 0.004)
    logits.float().logsumexp(1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast() -> None:
    torch.manual_seed(0)
    model = small_model(num_classes=5).to(DEVICE)
    images = random_images(4, 3, 64, 64).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert relative(logits, model(images)) < 0.03
    logits.float().logsumexp(1).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("windows", [(7, 7, 7, 7), None])
def test_shapes_depend_on_no_values(windows: tuple[int, ...] | None) -> None:
    """Fake tensors have no values, so reading one (.item(), nonzero) raises."""
    model = Twins(num_classes=5, windows=windows, drop_path_rate=0.2, drop_rate=0.1, **NARROW)
    mode = FakeTensorMode()
    parameters = {name: mode.from_tensor(value) for name, value in model.named_parameters()}
    with mode:
        logits = functional_call(model, parameters, (torch.empty(2, 3, 232, 200),))
        logits.sum().backward()
    assert logits.shape == (2, 5)


def test_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    model = Twins(
        num_classes=5,
        embed_dims=(8, 16),
        num_heads=(1, 2),
        mlp_ratios=(2, 2),
        depths=(2, 2),
        sr_ratios=(2, 1),
        windows=(7, 7),
        drop_path_rate=0.2,
    ).to(DEVICE)
    images = random_images(2, 3, 72, 64).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images).sum().backward()
    model.eval()
    assert relative(compiled(images), model(images)) < 1e-5


def test_drop_path_rises_linearly_and_stops_in_evaluation() -> None:
    model = Twins(num_classes=5, windows=(7,) * 4, drop_path_rate=0.3, **NARROW)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.blocks for b in stage]
    assert rates == pytest.approx([0.3 * i / 6 for i in range(7)])
    images = random_images(3, 3, 64, 64)
    torch.manual_seed(0)
    first, second = model(images), model(images)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(images), model(images))


def test_dropout_reaches_every_place() -> None:
    model = Twins(num_classes=5, windows=(7,) * 4, drop_rate=1.0, attn_drop_rate=0.5, **NARROW)
    features = model.forward_features(random_images(1, 3, 64, 64))
    assert not features.any(), "with everything dropped only the last norm's zero bias is left"


def test_gradients_have_the_strides_of_their_parameters() -> None:
    """Else DistributedDataParallel warns, and copies."""
    model = small_model(num_classes=5).to(DEVICE)
    model(random_images(2, 3, 64, 64).to(DEVICE)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_fresh_weights_follow_upstreams_rule() -> None:
    torch.manual_seed(0)
    model = small_model(num_classes=5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.LayerNorm)):
            assert not module.bias.any(), name


def test_no_weight_decay_names_the_positional_convolutions() -> None:
    model = small_model(num_classes=5)
    expected = {f"pos_block.{i}.proj.0.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert model.no_weight_decay() == expected


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = small_model(num_classes=8).to(DEVICE)
    optimizer = build_optimizer(model, lr=1e-3)
    images, labels = random_images(8, 3, 32, 32).to(DEVICE), torch.arange(8, device=DEVICE)
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.skipif(DEVICE.type != "cpu", reason="other devices draw other random numbers")
def test_losses_under_a_seed() -> None:
    torch.manual_seed(7)
    model = Twins(num_classes=5, windows=(7, 7, 7, 7), drop_path_rate=0.1, **NARROW)
    optimizer = build_optimizer(model, lr=1e-2)
    images, labels = random_images(4, 3, 64, 64), torch.arange(4)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([1.637944, 1.316565, 1.090883, 0.870251], rel=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_too_small_images(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=5)
        side = model.min_image_size
        assert model(torch.empty(1, 3, side, side)).shape == (1, 5)
        with pytest.raises(UserError, match=f"at least {side} pixels a side"):
            model(torch.empty(1, 3, side, side - 1))


def test_mistakes_in_building() -> None:
    with pytest.raises(UserError, match="'alt_gvt_smal': did you mean alt_gvt_small"):
        build_model("alt_gvt_smal", num_classes=5)
    with pytest.raises(UserError, match="'resnet50': known are alt_gvt_small, "):
        build_model("resnet50", num_classes=5)
    with pytest.raises(UserError, match="num_classes is 0"):
        build_model("alt_gvt_small", num_classes=0)
    with pytest.raises(UserError, match="one entry a stage, but have 4, 4, 4, 4, 4, 3"):
        Twins(num_classes=5, windows=(7, 7, 7), **NARROW)
    with pytest.raises(UserError, match="24 channels do not divide by 5 attention heads"):
        Twins(num_classes=5, windows=None, **{**NARROW, "num_heads": (1, 2, 5, 4)})
