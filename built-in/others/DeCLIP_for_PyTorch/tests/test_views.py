"""Pictures equal upstream's: torchvision's transforms of Pillow images, from the same draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional

from declip.views import EvalTransform, OneView, TwoViews, gaussian_blur, luma, turn_hue
from zoo_common.errors import UserError

STILL = {"jitter_probability": 0, "gray": 0, "blur": 0, "flip": 0}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth with edges and noise, and black and white corners where values are clipped."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    waves = 127 + 120 * np.sin(x / rng.uniform(3, 30, 3) + y / rng.uniform(3, 30, 3))
    pixels = waves + rng.normal(0, 12, (height, width, 3)) + 60 * (x + y > (width + height) / 2)
    pixels[: height // 6, : width // 6] = 0
    pixels[-height // 6 :, -width // 6 :] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def planes(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def upstream_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def upstream_view(size: int) -> transforms.Compose:
    """MOCOV2 up to ToTensor."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([upstream_blur], p=0.5),
            transforms.RandomHorizontalFlip(),
        ]
    )


@pytest.fixture
def pillow_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resize of machines where torch has no fast one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


def compare(size: int, pictures: int) -> np.ndarray:
    """How many values differ by 0, 1, ... grey levels; the generators end in the same state."""
    theirs, ours = upstream_view(size), TwoViews(size)
    counts = np.zeros(256, np.int64)
    for seed in range(pictures):
        image = photo(*((160, 120), (90, 200), (70, 70))[seed % 3], seed=seed)
        seed_all(seed)
        expected = np.stack([planes(theirs(image)) for _ in range(2)]).astype(int)
        after = random.random(), torch.rand(1)
        seed_all(seed)
        views = ours(image)
        assert views.shape == (2, 3, size, size) and views.dtype == np.uint8
        assert after == (random.random(), torch.rand(1))
        counts += np.bincount(np.abs(views - expected).ravel(), minlength=256)
    return counts / counts.sum()


# ---------------------------------------------------------------------------- training views


@pytest.mark.usefixtures("pillow_resize")
@pytest.mark.parametrize(("size", "pictures"), [(64, 120), (224, 30)])
def test_two_views_equal_upstreams(size: int, pictures: int) -> None:
    # Pillow's own floats may be rounded otherwise where its compiler fuses products and sums.
    differing = compare(size, pictures)[1:]
    assert differing.sum() < 1e-4 and differing[2:].sum() == 0


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="Pillow resizes here"
)
def test_views_after_the_fast_resize_differ_by_few_levels() -> None:
    differing = compare(224, 30)[1:]
    assert 0 < differing.sum() < 0.06
    assert differing[1:].sum() < 0.01
    assert differing[3:].sum() < 5e-4
    assert differing[12:].sum() < 1e-5


@pytest.mark.usefixtures("pillow_resize")
def test_the_view_of_clip_is_a_crop_and_draws_nothing_else() -> None:
    theirs, ours = transforms.RandomResizedCrop(48, scale=(0.5, 1.0)), OneView(48)
    for seed in range(20):
        image = photo(80, 60, seed)
        seed_all(seed)
        expected, after = planes(theirs(image)), torch.rand(1)
        seed_all(seed)
        (view,) = ours(image)
        assert np.array_equal(view, expected)
        assert torch.rand(1) == after


@pytest.mark.usefixtures("pillow_resize")
@pytest.mark.parametrize("part", ["color_jitter", "hue"])
def test_colours_without_one_part_equal_torchvisions(part: str) -> None:
    kept = {"color_jitter": 0.4, "hue": 0.3} | {part: 0.0}
    strength = kept["color_jitter"]
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(48, scale=(0.2, 1.0)),
            transforms.ColorJitter(strength, strength, strength, kept["hue"]),
        ]
    )
    ours = OneView(48, crop_min=0.2, jitter_probability=1, **kept)
    for seed in range(20):
        image = photo(80, 60, seed)
        seed_all(seed)
        torch.rand(1)  # RandomApply's
        crop = transforms.RandomResizedCrop.get_params
        seed_all(seed)
        box = crop(image, [0.2, 1.0], [3 / 4, 4 / 3])
        torch.rand(1)
        cropped = functional.resized_crop(image, *box, [48, 48])
        expected = planes(theirs.transforms[1](cropped))
        seed_all(seed)
        assert np.array_equal(ours(image)[0], expected)


def test_everything_can_be_switched_off() -> None:
    still = TwoViews(32, crop_min=1, **STILL)
    mirror = TwoViews(32, crop_min=1, **STILL | {"flip": 1})
    image = photo(40, 40)
    for seed in range(5):
        seed_all(seed)
        first, second = still(image)
        seed_all(seed)
        assert np.array_equal(mirror(image)[0], first[..., ::-1])
        boxes = [still.draw(image).box for _ in range(2)]
        if boxes[0] == boxes[1]:
            assert np.array_equal(first, second)


def test_a_gray_view_has_three_equal_planes() -> None:
    for view in TwoViews(32, gray=1, blur=1)(photo(50, 40)):
        assert np.ptp(view[0]) > 0
        assert np.array_equal(view[0], view[1]) and np.array_equal(view[1], view[2])


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 2), (2, 1), (3, 2), (1, 700), (700, 1), (5, 400)]
)
def test_images_of_any_shape_become_pictures(width: int, height: int) -> None:
    white = Image.new("RGB", (width, height), "white")
    for seed in range(20):
        seed_all(seed)
        assert TwoViews(32)(photo(width, height)).shape == (2, 3, 32, 32)
        assert OneView(32, blur=1)(white).min() == 255
    assert EvalTransform(32)(photo(width, height)).image_HWC.shape == (32, 32, 3)
    assert TwoViews(1, blur=1)(photo(width, height)).shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size=0 is no size"),
        ({"crop_min": 0}, "crop_min=0 is no share"),
        ({"crop_min": 1.5}, "crop_min=1.5 is no share"),
        ({"color_jitter": -1}, "color_jitter=-1 is negative"),
        ({"hue": 0.6}, "hue=0.6 is no change of hue"),
        ({"jitter_probability": 2}, "jitter_probability=2 is no probability"),
        ({"gray": -0.1}, "gray=-0.1 is no probability"),
        ({"blur": 1.1}, "blur=1.1 is no probability"),
        ({"flip": 1.1}, "flip=1.1 is no probability"),
    ],
)
def test_settings_out_of_range_are_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoViews(**options)


# ---------------------------------------------------------------------------- colours and blur


def test_hue_and_brightness_equal_pillows_in_all_colours() -> None:
    """Every 5th level of each channel, the edges and ties among them."""
    levels = np.append(np.arange(0, 255, 5), [1, 254, 255]).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    image = Image.fromarray(grid)
    assert np.array_equal(luma(planes(image)), np.asarray(image.convert("L")))
    for turns in (-0.5, -0.1, -0.003, 0.0, 0.05, 0.1, 0.3, 0.5):
        expected = planes(functional.adjust_hue(image, turns)).astype(int)
        difference = np.abs(turn_hue(planes(image), turns) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-4


@pytest.mark.parametrize("sigma", [0.1, 0.37, 1.0, 1.41, 1.42, 1.7, 2.0, 4.0])
def test_blur_equals_pillows(sigma: float) -> None:
    for width, height in ((64, 48), (3, 90), (1, 2), (1, 1)):
        image = photo(width, height)
        expected = planes(image.filter(ImageFilter.GaussianBlur(sigma)))
        assert np.array_equal(gaussian_blur(planes(image), sigma), expected)
        gray = image.convert("L")
        expected = np.asarray(gray.filter(ImageFilter.GaussianBlur(sigma)))
        assert np.array_equal(gaussian_blur(np.asarray(gray)[None], sigma)[0], expected)


# ---------------------------------------------------------------------------- evaluation pictures


@pytest.mark.parametrize("size", [64, 224])
def test_evaluation_pictures_equal_upstreams(size: int) -> None:
    theirs = transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)])
    for shape in ((500, 375), (375, 500), (256, 256), (73, 90), (97, 31), (333, 334), (300, 50)):
        image = photo(*shape)
        expected = np.asarray(theirs(image))
        assert np.array_equal(EvalTransform(size)(image).image_HWC, expected), shape


def test_a_very_long_image_is_not_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    original = Image.Image.resize

    def record(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        widths.append(max(size))
        return original(image, size, *rest)

    stripes = np.repeat(np.arange(6000) % 256, 3).reshape(1, 6000, 3).astype(np.uint8)
    image = Image.fromarray(stripes)
    whole = np.asarray(image.crop((2980, 0, 3020, 1)).resize((73 * 40, 73), 2))
    monkeypatch.setattr(Image.Image, "resize", record)
    picture = EvalTransform(64)(image).image_HWC
    assert max(widths) <= 8 * 73
    middle = whole[4:68, 73 * 20 - 32 : 73 * 20 + 32].astype(int)
    assert np.abs(picture - middle).max() <= 1
