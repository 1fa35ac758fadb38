"""The networks: names, what is trained, rows of any length, views, precisions, that they learn."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from declip import weights
from declip.batch import Batch, Masked
from declip.config import Config
from declip.losses.masked_language import masked_language_loss
from declip.model import CLIP, DeCLIP, Features, build_model
from declip.objective import Objective
from declip.recipe import build_optimizer, clamp_scale
from declip.static import SIZE, TOWERS, VOCABULARY, draw_batch, narrow_config
from zoo_common import device
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
# HCCL and the NPU's kernels have no float64.
DTYPE, TOLERANCE = (torch.float32, 2e-5) if DEVICE.type == "npu" else (torch.float64, 1e-11)

# Sense-GVT/DeCLIP's networks: tensors, parameters, and the sum over all names and shapes.
PUBLISHED = {
    ("declip", "vit"): (335, 180_306_946, "01091e9113f4cff1"),
    ("declip", "resnet"): (524, 133_659_746, "1e13d1f15fe9a5bb"),
    ("clip", "vit"): (303, 151_278_337, "5ddd5f91de847d35"),
    ("clip", "resnet"): (492, 104_106_849, "779a5b928b8613c8"),
}


def build(config: Config, dtype: torch.dtype = DTYPE, seed: int = 0) -> CLIP:
    """A narrow network on the device, in whose blocks nothing is zero."""
    torch.manual_seed(seed)
    model = build_model(config.model, config.loss, VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "_bias", "bn3.weight")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE, dtype).train()


def config_of(tower: str, objective: str = "declip") -> Config:
    config = narrow_config(tower)
    if objective == "clip":
        config.model.objective = "clip"
        config.loss.clip = 1.0
        config.loss.nn_text = config.loss.simsiam = config.loss.masked_language = 0.0
    return config


def batch_for(model: CLIP, seed: int = 1, images: int = 4) -> Batch:
    """Both views and all texts of a DeCLIP, the first ones for a CLIP; normalised float images."""
    batch = draw_batch(seed, images).to(DEVICE)
    batch = batch._replace(
        images_VBCHW=model.normalize(batch.images_VBCHW.flatten(0, 1))
        .unflatten(0, (2, -1))
        .to(model.logit_scale.dtype)
    )
    if isinstance(model, DeCLIP):
        return batch
    return batch._replace(
        images_VBCHW=batch.images_VBCHW[:1],
        tokens_UBT=batch.tokens_UBT[:1],
        ends_UB=batch.ends_UB[:1],
        masked=None,
    )


def make_objective(config: Config, dtype: torch.dtype = DTYPE) -> Objective:
    return Objective(
        config.loss, config.model.embed_dim, device=DEVICE, seed=0, rank=0, dtype=dtype
    )


def gradients(model: CLIP, batch: Batch, config: Config) -> dict[str, Tensor]:
    model.zero_grad()
    losses = make_objective(config, model.logit_scale.dtype)(model(batch), batch)
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: Tensor, theirs: Tensor) -> float:
    difference = ours.detach().cpu().double() - theirs.detach().cpu().double()
    return (difference.abs().max() / theirs.detach().abs().max()).item()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Gradients are the same, but for rounding noise."""
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max().item() for value in theirs.values())
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max().item() <= TOLERANCE * largest, name


@pytest.mark.parametrize(("objective", "tower"), PUBLISHED)
def test_names_and_shapes_are_the_published_networks(objective: str, tower: str) -> None:
    config = Config()
    config.model.objective, config.model.tower = objective, tower
    if tower == "resnet":
        config.model.image_width, config.model.image_heads = 64, 32
        config.model.embed_dim = 1024
    with torch.device("meta"):
        model = build_model(config.model, config.loss, 49409)
    state_dict = model.state_dict()
    listed = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state_dict.items()))
    tensors, parameters, digest = PUBLISHED[objective, tower]
    assert len(state_dict) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("tower", TOWERS)
def test_a_published_checkpoint_starts_a_run(tower: str, tmp_path: Path) -> None:
    config = config_of(tower)
    trained = build(config, torch.float32, seed=3)
    state_dict = {f"module.{name}": value.cpu() for name, value in trained.state_dict().items()}
    checkpoint = {"model": state_dict, "optimizer": {"state": {}}, "last_iter": 128000}
    torch.save(checkpoint, tmp_path / "ckpt.pth.tar")
    model = build(config, torch.float32)
    weights.load_start(model, tmp_path / "ckpt.pth.tar", config.model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


@pytest.mark.parametrize("objective", ["declip", "clip"])
@pytest.mark.parametrize("tower", TOWERS)
def test_everything_is_trained_but_what_upstream_leaves(tower: str, objective: str) -> None:
    config = config_of(tower, objective)
    model = build(config)
    found = gradients(model, batch_for(model), config)
    left = {name: parameter for name, parameter in model.named_parameters() if name not in found}
    frozen = {"vit": {"visual.conv1.weight"}, "resnet": {"visual.fc.weight", "visual.fc.bias"}}
    assert set(left) == frozen[tower]
    assert not any(parameter.requires_grad for parameter in left.values())


@pytest.mark.parametrize("part", ["simsiam", "masked_language", "nn_text"])
def test_a_loss_of_weight_0_is_not_computed(part: str) -> None:
    config = config_of("vit")
    setattr(config.loss, part, 0.0)
    model = build(config)
    batch = batch_for(model)
    features = model(batch)
    assert (features.projected_VBP is None) == (part == "simsiam")
    assert (features.predicted_VBP is None) == (part == "simsiam")
    assert (features.words_MW is None) == (part == "masked_language")
    heads = {"simsiam": ("projector", "predictor"), "masked_language": ("text_label_predictor",)}
    found = gradients(model, batch, config)
    for name, parameter in model.named_parameters():
        without = name.startswith(heads.get(part, "none"))
        if name != "visual.conv1.weight":
            assert (name in found) == parameter.requires_grad == (not without), name


@pytest.mark.parametrize("tower", TOWERS)
def test_rows_need_no_padding(tower: str) -> None:
    config = config_of(tower)
    model = build(config)
    whole = batch_for(model)
    tokens_UBT, ends_UB = whole.tokens_UBT.clone(), whole.ends_UB.clamp(max=12)
    tokens_UBT.scatter_(2, ends_UB[..., None], VOCABULARY - 1)
    assert whole.masked is not None
    early_M = whole.masked.columns_M < 12
    masked = Masked(
        whole.masked.rows_M * early_M,
        whole.masked.columns_M * early_M,
        whole.masked.labels_M.where(early_M, -100),
    )
    padded = whole._replace(tokens_UBT=tokens_UBT, ends_UB=ends_UB, masked=masked)
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    expected = gradients(model, padded, config)
    model.load_state_dict(state_dict)
    trimmed = padded._replace(tokens_UBT=tokens_UBT[..., :16])
    assert_same(gradients(model, trimmed, config), expected)


def test_what_follows_the_end_changes_nothing() -> None:
    model = build(config_of("vit"))
    batch = batch_for(model)
    expected = model(batch)
    place_T = torch.arange(batch.tokens_UBT.shape[2], device=DEVICE)
    behind_UBT = place_T > batch.ends_UB[..., None]
    other = model(batch._replace(tokens_UBT=batch.tokens_UBT.where(~behind_UBT, 5)))
    assert relative(other.texts_UBD, expected.texts_UBD) < TOLERANCE
    assert batch.masked is not None
    real_M = batch.masked.labels_M >= 0
    assert real_M.any() and not real_M.all()
    words, expected_words = other.words_MW * real_M[:, None], expected.words_MW * real_M[:, None]
    assert relative(words, expected_words) < TOLERANCE


def test_a_word_sees_none_that_follow() -> None:
    text = build(config_of("vit")).encode_text
    tokens_BT = torch.arange(20, device=DEVICE)[None]
    expected = text(tokens_BT)
    other = text(tokens_BT.where(tokens_BT < 13, 3))
    assert relative(other[:, :13], expected[:, :13]) < TOLERANCE
    assert relative(other[:, 13:], expected[:, 13:]) > 0.01


def test_slots_hold_the_words_at_their_places() -> None:
    model = build(config_of("vit"))
    assert isinstance(model, DeCLIP)
    batch = batch_for(model)
    assert batch.masked is not None
    words_NTW = model.text_label_predictor(model.encode_text(batch.tokens_UBT.flatten(0, 1)))
    expected = words_NTW[batch.masked.rows_M, batch.masked.columns_M]
    words_MW = model(batch).words_MW
    assert relative(words_MW, expected) < TOLERANCE
    filled_M = batch.masked.labels_M >= 0
    full = masked_language_loss(words_MW, batch.masked.labels_M)
    # Empty slots hold any word, and count for nothing.
    alone = masked_language_loss(words_MW[filled_M], batch.masked.labels_M[filled_M])
    assert relative(full, alone) < TOLERANCE


@pytest.mark.parametrize("tower", TOWERS)
def test_a_view_is_as_if_it_were_alone(tower: str) -> None:
    """In a ResNet too, whose statistics are of one view, and move once for each."""
    config = config_of(tower)
    model, other = build(config), build(config)
    images_VBCHW = batch_for(model).images_VBCHW
    together = model.view_features(images_VBCHW)
    alone = torch.cat([other.view_features(images_VBCHW[[view]]) for view in range(2)])
    assert relative(together, alone) < TOLERANCE
    for name, value in model.visual.state_dict().items():
        assert relative(value.float(), other.visual.state_dict()[name].float()) < 1e-6, name


@pytest.mark.parametrize("tower", TOWERS)
def test_pixels_are_normalised_inside(tower: str) -> None:
    model = build(config_of(tower), torch.float32).eval()
    pixels = draw_batch(1).images_VBCHW[0].to(DEVICE)
    mean = torch.tensor([0.485, 0.456, 0.406], device=DEVICE).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=DEVICE).view(3, 1, 1)
    features = model.image_features(pixels)
    assert relative(features, model.image_features((pixels / 255 - mean) / std)) < 1e-4
    assert pixels.dtype == torch.uint8
    assert features.shape == (4, 32)


def test_evaluation_and_training_give_texts_the_same_features() -> None:
    model = build(config_of("vit"))
    batch = batch_for(model)
    expected = model(batch).texts_UBD[1]
    found = model.eval().caption_features(batch.tokens_UBT[1], batch.ends_UB[1])
    assert relative(found, expected) < TOLERANCE


@pytest.mark.parametrize(("level", "dtype"), [("O1", "bfloat16"), ("O2", "bfloat16")])
@pytest.mark.parametrize("tower", TOWERS)
def test_half_precision_is_near_float32(tower: str, level: str, dtype: str) -> None:
    config = config_of(tower)
    losses = {}
    for precision_config in (PrecisionConfig(opt_level="O0"), PrecisionConfig(level, dtype)):
        model = build(config, torch.float32)
        batch = draw_batch(1).to(DEVICE)
        optimizer = build_optimizer(model, config.optimizer)
        precision = Precision(precision_config, model, optimizer, DEVICE)
        objective = make_objective(config, torch.float32)
        with precision.autocast(model):
            features: Features = model(batch)
        found = objective(features, batch)
        assert {loss.dtype for loss in found.values()} == {torch.float32}
        assert precision.step(torch.stack(list(found.values())).sum())
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        losses[precision_config.opt_level] = {name: loss.item() for name, loss in found.items()}
    assert losses["O0"].keys() == losses[level].keys()
    for name, loss in losses["O0"].items():
        assert losses[level][name] == pytest.approx(loss, rel=0.02, abs=0.02), name


@pytest.mark.parametrize("tower", TOWERS)
def test_overfits_one_batch(tower: str) -> None:
    config = config_of(tower)
    config.optimizer.lr = 3e-3
    model = build(config, torch.float32)
    batch = draw_batch(1, images=6).to(DEVICE)
    optimizer = build_optimizer(model, config.optimizer)
    objective = make_objective(config, torch.float32)
    losses: dict[str, Tensor] = {}
    for _ in range(40):
        losses = objective(model(batch), batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        clamp_scale(model, optimizer, config.loss)
        optimizer.step()
        clamp_scale(model, optimizer, config.loss)
    weighted = vars(config.loss)
    found = {name: loss.item() / weighted[name] for name, loss in losses.items()}
    assert found["clip"] < 0.2, found
    assert found["nn_text"] < 0.5, found
    assert found["simsiam"] < -0.5, found
    assert found["masked_language"] < 2, found


def test_fresh_weights_follow_upstreams_rule() -> None:
    torch.manual_seed(0)
    config = narrow_config("vit")
    config.model.image_width = config.model.text_width = 128
    model = build_model(config.model, config.loss, VOCABULARY)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for transformer in (model.visual.transformer, model.encode_text.transformer):
        for block in transformer.resblocks:
            assert block.attn.in_proj_weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
            assert block.mlp.c_fc.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                assert layer.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
            assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
    assert model.encode_text.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.encode_text.positional_embedding.std().item() == pytest.approx(0.01, rel=0.1)
    resnet = build_model(narrow_config("resnet").model, config.loss, VOCABULARY).visual
    ends = [module for name, module in resnet.named_modules() if name.endswith("0.bn3")]
    assert len(ends) == 4
    assert not any(norm.weight.any() for norm in ends if isinstance(norm, nn.BatchNorm2d))


def test_gradients_have_the_strides_of_their_parameters() -> None:
    """Else DistributedDataParallel warns, and copies."""
    for tower in TOWERS:
        config = config_of(tower)
        model = build(config, torch.float32)
        for name, gradient in gradients(model, batch_for(model), config).items():
            assert gradient.stride() == model.get_parameter(name).stride(), name


def test_images_are_of_the_size_of_the_config() -> None:
    for tower in TOWERS:
        model = build(config_of(tower), torch.float32).eval()
        assert model.image_features(torch.zeros(2, 3, SIZE, SIZE, device=DEVICE)).shape == (2, 32)
