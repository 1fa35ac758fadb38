"""Pictures equal timm's, on the way of the recipe and where timm would fail."""

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing

from twins import data
from twins.data import (
    RAND_AUGMENT,
    EvalTransform,
    Preprocess,
    TrainTransform,
    build_eval_data,
    build_train_data,
    draw_erasing,
    rand_augment,
    resize,
    shear_or_shift,
)
from zoo_common import device
from zoo_common.data import Batch, Pixels, kept_rng
from zoo_common.errors import UserError
from zoo_common.imagenet import IMAGENET_MEAN, FolderIndex, build_index

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
GREY = tuple(round(255 * value) for value in IMAGENET_MEAN)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth with edges and noise, and black and white corners where values are clipped."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    waves = 127 + 120 * np.sin(x / rng.uniform(3, 30, 3) + y / rng.uniform(3, 30, 3))
    pixels = waves + rng.normal(0, 12, (height, width, 3)) + 60 * (x + y > (width + height) / 2)
    pixels[: height // 6, : width // 6] = 0
    pixels[-height // 6 :, -width // 6 :] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def plane(pixels: Pixels) -> np.ndarray:
    return pixels.image_HWC.transpose(2, 0, 1)


@pytest.fixture
def pillow_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resize of machines where torch has no fast one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


@pytest.fixture
def timm_posterizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timm as with the Pillow of its time, which kept no bits when asked for none."""
    posterize = auto_augment.posterize

    def mended(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
        if bits_to_keep == 0:
            return image.point(lambda value: 0)
        return posterize(image, bits_to_keep, **options)

    monkeypatch.setitem(auto_augment.NAME_TO_OP, "PosterizeIncreasing", mended)


# ---------------------------------------------------------------------------- training pictures


@pytest.mark.usefixtures("pillow_resize", "timm_posterizes")
@pytest.mark.parametrize("size", [64, 224])
def test_training_pictures_equal_timms_bit_for_bit(size: int) -> None:
    theirs = create_transform(
        size,
        is_training=True,
        auto_augment=RAND_AUGMENT,
        interpolation="bicubic",
        use_prefetcher=True,
    )
    ours = TrainTransform(size, erase_prob=0)
    for seed in range(150 if size == 64 else 30):
        image = photo(*((160, 120), (90, 200), (70, 70))[seed % 3], seed=seed)
        seed_all(seed)
        expected = theirs(image)
        after = random.random()
        seed_all(seed)
        assert np.array_equal(plane(ours(image)), expected.numpy()), seed
        assert random.random() == after


@pytest.mark.usefixtures("pillow_resize")
def test_colour_jitter_takes_the_place_of_rand_augment() -> None:
    theirs = create_transform(
        48, is_training=True, color_jitter=0.4, interpolation="bicubic", use_prefetcher=True
    )
    ours = TrainTransform(48, auto_augment="", color_jitter=0.4, erase_prob=0)
    for seed in range(20):
        image = photo(80, 60, seed)
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert np.array_equal(plane(ours(image)), expected.numpy())


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="Pillow resizes here"
)
@pytest.mark.parametrize(
    ("width", "height"), [(300, 260), (150, 180), (224, 224), (1, 9), (900, 40)]
)
def test_the_fast_resize_is_pillows_up_to_rounding(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    image = photo(width, height)
    ours = np.asarray(resize(image, 224)).astype(int)
    pillows = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(ours - pillows)
    assert difference.max() <= 4
    assert (difference > 0).mean() < 0.08
    assert (difference > 1).mean() < 1e-3
    assert abs((ours - pillows).mean()) < 0.01


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 31), (3, 200), (1, 1), (2, 1)])
def test_shears_and_shifts_equal_pillows(vertical: bool, width: int, height: int) -> None:
    image = photo(width, height)
    moves = [(0.3, 0.0), (-0.3, 0.0), (0.0, 0.0), (0.27182, 0.0), (1e-3, 0.0)]
    moves += [(0.0, share * width) for share in (0.45, -0.45, 0.4123, -0.5, 0.01, 3.0)]
    # Almost a whole pixel: the position is rounded up in one part of a row, and not in another.
    moves += [(0.0, np.nextafter(float(width // 2), 0)), (0.0, -np.nextafter(1.0, 0))]
    for slope, shift in moves:
        matrix = (1, 0, 0, slope, 1, shift) if vertical else (1, slope, shift, 0, 1, 0)
        expected = image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BICUBIC,
            fillcolor=GREY,
        )
        moved = shear_or_shift(
            image,
            slope,
            shift,
            vertical=vertical,
            fillcolor=GREY,
            resample=Image.Resampling.BICUBIC,
        )
        assert np.array_equal(np.asarray(moved), np.asarray(expected)), (slope, shift)


def test_no_bits_to_keep_are_black_and_not_an_error() -> None:
    augment = rand_augment("rand-m10-n1-p1-inc1", 32)
    augment.ops = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    assert np.asarray(augment(photo(32, 32))).max() == 0
    augment.ops[0].magnitude = 5
    kept = np.unique(np.asarray(augment(photo(32, 32))))
    assert set(kept) == {0, 64, 128, 192}


def test_everything_can_be_switched_off() -> None:
    still = TrainTransform(
        32,
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        hflip=0,
        auto_augment="",
        color_jitter=0,
        erase_prob=0,
    )
    image = photo(50, 40)
    expected = np.asarray(resize(image.crop((5, 0, 45, 40)), 32))
    for seed in range(5):
        seed_all(seed)
        pixels = still(image)
        assert np.array_equal(pixels.image_HWC, expected)
        assert pixels.draws == ()
    mirror = TrainTransform(
        32, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=1, auto_augment="", color_jitter=0
    )
    assert np.array_equal(mirror(image).image_HWC, expected[:, ::-1])


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 2), (2, 1), (3, 2), (1, 700), (700, 1), (5, 400)]
)
def test_images_of_any_shape_become_pictures(width: int, height: int) -> None:
    transform, evaluation = TrainTransform(32), EvalTransform(32)
    crop_only = TrainTransform(32, hflip=0, auto_augment="", color_jitter=0)
    white = Image.new("RGB", (width, height), "white")
    for seed in range(40):
        seed_all(seed)
        assert transform(photo(width, height)).image_HWC.shape == (32, 32, 3)
        assert crop_only(white).image_HWC.min() == 255
    assert evaluation(photo(width, height)).image_HWC.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size=0 is no size"),
        ({"hflip": 1.5}, "hflip=1.5 is no probability"),
        ({"erase_prob": -0.1}, "erase_prob=-0.1 is no probability"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale=\(0.5, 1.5\) is no range"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio=\(2.0, 1.0\) is no range"),
        ({"color_jitter": -1}, "color_jitter=-1 is negative"),
        ({"auto_augment": "augmix-m3"}, "'augmix-m3' is no RandAugment of timm; give one like"),
        ({"auto_augment": "rand-q9"}, "'rand-q9' is no RandAugment of timm"),
    ],
)
def test_settings_out_of_range_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainTransform(**options)


# ---------------------------------------------------------------------------- evaluation pictures


@pytest.mark.parametrize("size", [64, 224])
def test_evaluation_pictures_equal_timms_bit_for_bit(size: int) -> None:
    theirs = create_transform(size, interpolation="bicubic", crop_pct=0.875, use_prefetcher=True)
    ours = EvalTransform(size)
    for shape in ((500, 375), (375, 500), (256, 256), (73, 90), (97, 31), (333, 334), (300, 50)):
        image = photo(*shape)
        assert np.array_equal(plane(ours(image)), theirs(image).numpy()), shape


def test_a_very_long_image_is_not_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    original = Image.Image.resize

    def record(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        widths.append(max(size))
        return original(image, size, *rest)

    stripes = np.repeat(np.arange(6000) % 256, 3).reshape(1, 6000, 3).astype(np.uint8)
    image = Image.fromarray(stripes)
    expected = np.asarray(image.crop((2980, 0, 3020, 1)).resize((73 * 40, 73), 3))
    monkeypatch.setattr(Image.Image, "resize", record)
    picture = EvalTransform(64)(image).image_HWC
    assert max(widths) <= 8 * 73
    middle = expected[4:68, 73 * 20 - 32 : 73 * 20 + 32].astype(int)
    assert np.abs(picture - middle).max() <= 1


# ---------------------------------------------------------------------------- erasing


def test_rectangles_equal_timms() -> None:
    for seed in range(400):
        random.seed(seed)
        erased = RandomErasing(0.25, mode="const", device="cpu")(torch.ones(1, 40, 40))[0] == 0
        random.seed(seed)
        top, left, height, width, _ = draw_erasing(40, 0.25)
        expected = torch.zeros(40, 40, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(erased, expected), seed


def make_batch(draws: list[tuple[int, ...]], size: int = 48) -> Batch:
    torch.manual_seed(0)
    return Batch(
        images_BCHW=torch.randint(0, 256, (len(draws), 3, size, size), dtype=torch.uint8),
        labels_B=torch.zeros(len(draws), dtype=torch.int64),
        draws_BD=torch.tensor(draws, dtype=torch.int64).reshape(len(draws), -1),
        item_ids=[""] * len(draws),
        damaged=[],
    )


@pytest.mark.device
def test_preprocessing_normalises_as_timm() -> None:
    batch = make_batch([(), ()])
    theirs = create_transform(48, interpolation="bicubic", crop_pct=1.0)
    result = Preprocess(48).to(DEVICE)(batch.to(DEVICE))
    assert result.dtype == torch.float32
    for image, expected in zip(result.cpu(), batch.images_BCHW, strict=True):
        expected = theirs(Image.fromarray(expected.permute(1, 2, 0).numpy()))
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.device
def test_erasing_fills_the_rectangle_with_standard_normal_noise() -> None:
    random.seed(1)
    draws = [draw_erasing(48, 0.5) for _ in range(200)]
    batch = make_batch(draws)
    kept = Preprocess(48)(batch._replace(draws_BD=batch.draws_BD[:, :0]))
    result = Preprocess(48).to(DEVICE)(batch.to(DEVICE)).cpu()
    noise = []
    for image, before, (top, left, height, width, _) in zip(result, kept, draws, strict=True):
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        torch.testing.assert_close(image[:, ~inside], before[:, ~inside], rtol=1e-5, atol=1e-6)
        noise.append(image[:, inside].flatten())
    share = sum(bool(len(part)) for part in noise) / len(noise)
    assert 0.4 < share < 0.6
    values = torch.cat(noise).double()
    error = 5 / math.sqrt(len(values))
    assert abs(values.mean()) < error
    assert abs(values.var() - 1) < 2 * error
    assert abs((values**4).mean() - 3) < 12 * error
    assert torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1].abs() < error


def test_noise_belongs_to_the_image_and_the_seed() -> None:
    random.seed(0)
    draws = [draw_erasing(48, 1.0) for _ in range(4)]
    batch = make_batch(draws)
    whole = Preprocess(48, seed=7)(batch)
    part = Preprocess(48, seed=7)(
        batch._replace(images_BCHW=batch.images_BCHW[2:], draws_BD=batch.draws_BD[2:])
    )
    assert torch.equal(whole[2:], part)
    assert not torch.equal(whole, Preprocess(48, seed=8)(batch))


@pytest.mark.device
def test_fixed_shapes_erase_the_same_numbers() -> None:
    random.seed(3)
    batch = make_batch([draw_erasing(48, 0.5) for _ in range(30)]).to(DEVICE)
    preprocess = Preprocess(48).to(DEVICE)
    images = preprocess.normalize(batch.images_BCHW)
    fixed = preprocess.erase_all(images, batch.draws_BD)
    assert not torch.equal(fixed, images)
    assert torch.equal(fixed, preprocess.erase_each(images.clone(), batch.draws_BD))


# ---------------------------------------------------------------------------- streams


@pytest.fixture
def index(tmp_path: Path) -> FolderIndex:
    for split, count in (("train", 20), ("val", 7)):
        for number in range(count):
            folder = tmp_path / split / f"c{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            photo(60 + number, 70 - number, number).save(folder / f"{number}.jpg")
    return build_index(tmp_path, "train")


def contents(batches: list[Batch]) -> list[bytes]:
    return [
        b"".join(part.numpy().tobytes() for part in (b.images_BCHW, b.labels_B, b.draws_BD))
        for b in batches
    ]


def test_augmentation_is_the_same_with_any_workers_after_resuming(index: FolderIndex) -> None:
    options = {"batch_size": 4, "input_size": 64, "seed": 3, "total_steps": 12}
    whole = contents(list(build_train_data(index, workers=0, **options)))
    assert len(set(whole)) == 12
    for workers, start in ((1, 7), (2, 3)):
        resumed = build_train_data(index, workers=workers, start_step=start, **options)
        assert contents(list(resumed)) == whole[start:]


def test_ranks_together_see_the_pictures_of_one_process(index: FolderIndex) -> None:
    options = {"input_size": 64, "seed": 1, "total_steps": 1, "workers": 0}
    (alone,) = build_train_data(index, batch_size=8, **options)
    preprocess = Preprocess(64)
    pictures = [
        preprocess(*build_train_data(index, batch_size=2, rank=rank, world_size=4, **options))
        for rank in range(4)
    ]
    assert torch.equal(torch.cat(pictures), preprocess(alone))


def test_evaluation_data_are_exact_over_ranks(index: FolderIndex) -> None:
    val = build_index(index.root, "val")
    seen = []
    for rank in range(2):
        with kept_rng():
            seed_all(rank)
            for batch in build_eval_data(
                val, batch_size=3, input_size=32, rank=rank, world_size=2, workers=0
            ):
                assert batch.images_BCHW.shape[1:] == (3, 32, 32)
                assert batch.draws_BD.shape[1] == 0
                seen += batch.item_ids
    assert sorted(seen) == sorted(val.item_id(i) for i in range(7))


def test_the_noise_pool_has_room_for_large_pictures() -> None:
    random.seed(0)
    size = 1500
    places = [draw_erasing(size, 1.0)[4] for _ in range(20)]
    assert len(set(places)) > 15
    assert max(places) + 3 * size * size <= data._noise_pool_size(size)
