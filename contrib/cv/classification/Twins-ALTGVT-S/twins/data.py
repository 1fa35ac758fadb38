"""Pictures for training and evaluation, as the published recipe makes them.

Recipe: https://github.com/Meituan-AutoML/Twins (Apache-2.0) at 4700293, main.py and datasets.py,
which build on timm's transforms. From the same random numbers the training picture equals
timm's: bit for bit in what is cropped, flipped and augmented, up to rounding in the resize.
Differences, and why:

- The resize runs in torch where torch has a fast one (x86 with AVX2), five times as fast as
  Pillow's. Its integer weights are coarser: 4 % of the values differ by one grey level of 255,
  one in 30,000 by two to four. Elsewhere it is Pillow's, as in timm.
- Shears and translations are evaluated along one axis, in the same floating-point operations as
  Pillow's and with the same result, in half the time.
- PosterizeIncreasing with no bits left gives a black image, as its bit mask says; with Pillow 13
  timm's raises a ValueError there, once in 650 images.
- Random erasing takes its normal noise from a pool that is drawn once for a run, at a place that
  the image drew. timm draws it on the device in batch order, which would let the noise depend on
  the number of processes and on the device.
- A crop has at least one pixel, where timm's can round to none and fail; and of an image over 8
  times as long as wide, evaluation resizes only the middle, which is all that it looks at.
- JPEGs are always decoded at full size: Pillow's draft mode, which scales while it decodes, would
  change the picture, and could be used for crops of twice the input size only.

Shape letters: B images, C channels (RGB), H W pixels, T = W + 3 pixels that a row is made from,
D = 5 numbers of an erased rectangle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torchvision.transforms import ColorJitter

from zoo_common.data import Batch, BatchStream, Normalize, Pixels, build_eval_loader, build_loader
from zoo_common.errors import UserError
from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD, FolderIndex

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
"""timm's name of the recipe's RandAugment: magnitude 9 +- 0.5, two operations an image."""

EVAL_CROP = 0.875
"""Side of the evaluation crop as a share of the resized image's short side: 224 / 256."""

_ERASE_AREA = (0.02, 1 / 3)
_ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_MIN_NOISE_POOL = 1 << 22
_MAX_ASPECT = 8
_CPU = torch.device("cpu")


class TrainTransform:
    """A training picture: crop, resize, flip, RandAugment, and where to erase.

    Args:
        input_size: Side of the picture in pixels.
        crop_scale: Range of the crop's area as a share of the image's.
        crop_ratio: Range of the crop's width / height. With both ranges (1, 1) the picture is the
            central square.
        hflip: Probability of a horizontal flip.
        auto_augment: A RandAugment of timm, ``rand-...``; empty for none.
        color_jitter: Strength of brightness, contrast and saturation jitter; used only without
            ``auto_augment``, as in the recipe.
        erase_prob: Probability of erasing a rectangle; ``Preprocess`` carries it out.

    Raises:
        UserError: A value out of its range.
    """

    def __init__(
        self,
        input_size: int = 224,
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        auto_augment: str = RAND_AUGMENT,
        color_jitter: float = 0.4,
        erase_prob: float = 0.25,
    ) -> None:
        _check_input_size(input_size)
        for name, value in (("hflip", hflip), ("erase_prob", erase_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value} is no probability; give a value from 0 to 1")
        for name, (low, high) in (("crop_scale", crop_scale), ("crop_ratio", crop_ratio)):
            if not 0 < low <= high or (name == "crop_scale" and high > 1):
                raise UserError(f"{name}=({low}, {high}) is no range of shares; give (low, high)")
        if color_jitter < 0:
            raise UserError(f"color_jitter={color_jitter} is negative; give 0 to switch it off")
        self._size = input_size
        self._scale = crop_scale
        self._ratio = crop_ratio
        self._hflip = hflip
        self._erase_prob = erase_prob
        self._augment: Callable[[Image.Image], Image.Image] | None = None
        if auto_augment:
            self._augment = rand_augment(auto_augment, input_size)
        elif color_jitter:
            self._augment = ColorJitter(color_jitter, color_jitter, color_jitter)

    def __call__(self, image: Image.Image) -> Pixels:
        """Makes an RGB image into uint8 [H, W, C] and the rectangle to erase, if any."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            image, self._scale, self._ratio
        )
        # timm rounds the side of a crop in an image of a few pixels to 0.
        width, height = max(width, 1), max(height, 1)
        left, top = min(left, image.width - width), min(top, image.height - height)
        image = resize(image.crop((left, top, left + width, top + height)), self._size)
        if self._hflip and torch.rand(1) < self._hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._augment is not None:
            image = self._augment(image)
        draws = draw_erasing(self._size, self._erase_prob) if self._erase_prob else ()
        return Pixels(np.asarray(image), draws)


class EvalTransform:
    """An evaluation picture: resize by the short side, central crop; equal to timm's.

    Args:
        input_size: Side of the picture in pixels.
    """

    def __init__(self, input_size: int = 224) -> None:
        _check_input_size(input_size)
        self._size = input_size
        self._short = math.floor(input_size / EVAL_CROP)

    def __call__(self, image: Image.Image) -> Pixels:
        """Makes an RGB image into uint8 [H, W, C]."""
        short = min(image.size)
        if max(image.size) > _MAX_ASPECT * short:
            # Only the middle is seen; all of a 1 x 5000 image would be resized to a gigabyte.
            image = _central_crop(image, *(min(s, _MAX_ASPECT * short) for s in image.size))
        width, height = (int(self._short * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return Pixels(np.asarray(_central_crop(image, self._size, self._size)))


class Preprocess(nn.Module):
    """The device's part: uint8 images to normalised float32, with rectangles erased.

    On the device a batch goes through the same shapes whatever was drawn, and nothing is read
    back to the host.

    Args:
        input_size: Side of the pictures in pixels.
        seed: Decides the pool of noise.
    """

    noise: torch.Tensor

    def __init__(self, input_size: int = 224, *, seed: int = 0) -> None:
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        noise = torch.randn(_noise_pool_size(input_size), generator=generator)
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns float32 [B, C, H, W] for a batch of either transform, on this module's device."""
        images_BCHW: torch.Tensor = self.normalize(batch.images_BCHW)
        if batch.draws_BD.numel() == 0:
            return images_BCHW
        if images_BCHW.device.type == "cpu":
            return self.erase_each(images_BCHW, batch.draws_BD)
        return self.erase_all(images_BCHW, batch.draws_BD)

    def erase_each(self, images_BCHW: torch.Tensor, draws_BD: torch.Tensor) -> torch.Tensor:
        """Erases in place, image by image; shapes depend on what was drawn."""
        for image_CHW, (top, left, height, width, place) in zip(
            images_BCHW, draws_BD.tolist(), strict=True
        ):
            if height:
                rows, columns = slice(top, top + height), slice(left, left + width)
                image_CHW[:, rows, columns] = self._noise(place, image_CHW)[:, rows, columns]
        return images_BCHW

    def erase_all(self, images_BCHW: torch.Tensor, draws_BD: torch.Tensor) -> torch.Tensor:
        """The same numbers as ``erase_each`` in operations of fixed shapes, in a new tensor."""
        places = draws_BD[:, 4].tolist()
        noise_BCHW = torch.stack([self._noise(place, images_BCHW[0]) for place in places])
        rectangles_BD = draws_BD.to(images_BCHW.device, non_blocking=True)
        top_B1, left_B1, height_B1, width_B1 = rectangles_BD[:, :4].split(1, dim=1)
        row_H = torch.arange(images_BCHW.shape[2], device=images_BCHW.device)
        column_W = torch.arange(images_BCHW.shape[3], device=images_BCHW.device)
        rows_BH = (row_H >= top_B1) & (row_H < top_B1 + height_B1)
        columns_BW = (column_W >= left_B1) & (column_W < left_B1 + width_B1)
        erased_B1HW = rows_BH[:, None, :, None] & columns_BW[:, None, None, :]
        return torch.where(erased_B1HW, noise_BCHW, images_BCHW)

    def _noise(self, place: int, image_CHW: torch.Tensor) -> torch.Tensor:
        return self.noise[place : place + image_CHW.numel()].view(image_CHW.shape)


def build_train_data(
    index: FolderIndex,
    *,
    batch_size: int,
    input_size: int = 224,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    auto_augment: str = RAND_AUGMENT,
    color_jitter: float = 0.4,
    erase_prob: float = 0.25,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    total_steps: int | None = None,
    workers: int = 4,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream:
    """The training batches of one process for a whole run.

    The first group of arguments is that of ``TrainTransform``, the second that of
    ``zoo_common.data.build_loader``; so are the errors.
    """
    transform = TrainTransform(
        input_size,
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
        hflip=hflip,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        erase_prob=erase_prob,
    )
    return build_loader(
        index,
        transform,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        total_steps=total_steps,
        workers=workers,
        prefetch_factor=prefetch_factor,
        max_damaged=max_damaged,
        device=device,
    )


def build_eval_data(
    index: FolderIndex,
    *,
    batch_size: int,
    input_size: int = 224,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream:
    """The evaluation batches of one process; see ``zoo_common.data.build_eval_loader``."""
    return build_eval_loader(
        index,
        EvalTransform(input_size),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=workers,
        prefetch_factor=prefetch_factor,
        max_damaged=max_damaged,
        device=device,
    )


def resize(image: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing to size x size pixels; see the header for which one."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return image.resize((size, size), Image.Resampling.BICUBIC)
    # Pillow stores four bytes a pixel: so they are copied as they are, and torch is twice as fast
    # with four channels as with three.
    width, height = image.size
    packed = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    pixels_1CHW = packed.view(1, height, width, 4).permute(0, 3, 1, 2)
    resized_1CHW = nn.functional.interpolate(
        pixels_1CHW, (size, size), mode="bicubic", antialias=True
    )
    resized_HWC = resized_1CHW[0].permute(1, 2, 0).contiguous().numpy()
    return Image.frombytes("RGB", (size, size), resized_HWC, "raw", "RGBX")


def draw_erasing(size: int, probability: float) -> tuple[int, int, int, int, int]:
    """Draws (top, left, height, width, place in the pool of noise); all 0 for nothing to erase.

    The same draws from Python's generator as timm's ``RandomErasing`` makes for one rectangle:
    Zhong et al., https://arxiv.org/abs/1708.04896, algorithm 1.
    """
    if random.random() > probability:
        return 0, 0, 0, 0, 0
    for _ in range(10):
        area = random.uniform(*_ERASE_AREA) * size * size
        aspect = math.exp(random.uniform(*_ERASE_LOG_ASPECT))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if height < size and width < size:
            top = random.randint(0, size - height)
            left = random.randint(0, size - width)
            place = random.randrange(_noise_pool_size(size) - 3 * size * size)
            return top, left, height, width, place
    return 0, 0, 0, 0, 0


def rand_augment(name: str, input_size: int) -> Callable[[Image.Image], Image.Image]:
    """RandAugment of timm, with the operations of this module where they are faster or mended.

    Raises:
        UserError: No RandAugment has that name.
    """
    mean = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
    parameters = {
        "translate_const": int(input_size * 0.45),
        "img_mean": mean,
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        augment: Any = rand_augment_transform(name, parameters)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"'{name}' is no RandAugment of timm; give one like {RAND_AUGMENT}, or an empty name "
            "to switch it off"
        ) from error
    for op in augment.ops:
        op.aug_fn = _OPERATIONS.get(op.name, op.aug_fn)
    return augment  # type: ignore[no-any-return]


def shear_or_shift(
    image: Image.Image,
    slope: float,
    shift: float,
    *,
    vertical: bool,
    fillcolor: tuple[int, ...],
    resample: int,
) -> Image.Image:
    """Moves each row along itself: row y of the result is row y, read from slope (y + 1/2) + shift.

    Equal to Pillow's affine transform with its bicubic kernel, which evaluates the kernel in both
    directions although the pixel centres differ in one only.

    Args:
        image: RGB.
        slope: Pixels a row.
        shift: Pixels.
        vertical: Columns instead of rows.
        fillcolor: RGB of what comes from outside of the image.
        resample: Pillow's number of bicubic.
    """
    assert resample == Image.Resampling.BICUBIC
    if vertical:
        turned = shear_or_shift(
            image.transpose(Image.Transpose.TRANSPOSE),
            slope,
            shift,
            vertical=False,
            fillcolor=fillcolor,
            resample=resample,
        )
        return turned.transpose(Image.Transpose.TRANSPOSE)
    width, height = image.size
    # In the order of Pillow's additions: they round, and the result is truncated.
    row_H1 = (np.arange(height) + 0.5)[:, None]
    source_HT = ((np.arange(width + 3) + 0.5) + slope * row_H1) + shift
    outside_HW = (source_HT[:, :width] < 0) | (source_HT[:, :width] >= width)
    source_HT -= 0.5
    left_HT = np.floor(source_HT)
    fraction_HT = np.subtract(source_HT, left_HT, out=source_HT)
    first_H = left_HT[:, 0].astype(np.int64)
    left_HT -= left_HT[:, :1]
    if (left_HT != np.arange(width + 3)).any():
        # A position within rounding of a whole pixel falls to either side along the row.
        matrix = (1, slope, shift, 0, 1, 0)
        kernel = Image.Resampling.BICUBIC
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, kernel, fillcolor=fillcolor
        )
    taps_CHT = _aligned_taps(np.stack([np.asarray(band) for band in image.split()]), first_H - 1)
    moved_CHT = np.empty_like(taps_CHT)
    for taps_HT, moved_HT in zip(taps_CHT, moved_CHT, strict=True):
        _cubic(taps_HT.reshape(-1), fraction_HT.reshape(-1), moved_HT.reshape(-1))
    moved_CHW = moved_CHT[:, :, :width]
    np.copyto(moved_CHW, np.array(fillcolor, np.uint8)[:, None, None], where=outside_HW)
    return Image.merge(image.mode, [Image.fromarray(band_HW) for band_HW in moved_CHW])


def _aligned_taps(planes_CHW: NDArray[np.uint8], first_H: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Row y from pixel first_H[y] on, edges repeated: [C, H, W + 3]."""
    channels, height, width = planes_CHW.shape
    taps_CHT = np.empty((channels, height, width + 3), np.uint8)
    # Neighbouring rows often begin at the same pixel and are copied together.
    changes = np.flatnonzero(np.diff(first_H)) + 1
    for begin, end in zip([0, *changes], [*changes, height], strict=True):
        first = int(first_H[begin])
        low = min(max(-first, 0), width + 3)
        high = max(min(width - first, width + 3), low)
        taps, rows = taps_CHT[:, begin:end], planes_CHW[:, begin:end]
        taps[:, :, low:high] = rows[:, :, low + first : high + first]
        if low:
            taps[:, :, :low] = rows[:, :, :1]
        if high < width + 3:
            taps[:, :, high:] = rows[:, :, -1:]
    return taps_CHT


def _cubic(
    taps: NDArray[np.uint8],
    fraction: NDArray[np.float64],
    out: NDArray[np.uint8],
    block: int = 1 << 15,
) -> None:
    """out[i] = the cubic of Pillow's kernel through taps[i], ..., taps[i + 3] at fraction[i].

    Value 0 is taps[i + 1] and value 1 is taps[i + 2]; the polynomial is evaluated in Pillow's
    order, (p2 + f (p3 + f p4)) f + p1. The last three values are junk. Blocks stay in the cache.
    """
    for begin in range(0, len(taps) - 3, block):
        count = min(block, len(taps) - 3 - begin)
        value = taps[begin : begin + count + 3].astype(np.float64)
        step = value[1:] - value[:-1]
        f = fraction[begin : begin + count]
        curve = step[:-2] + step[2:]
        result = curve * f
        curve += step[:-2]
        result -= curve
        result *= f
        result += np.add(step[:-2], step[1:-1], out=curve)
        result *= f
        result += value[1:-2]
        whole = result.astype(np.int16)
        out[begin : begin + count] = np.minimum(np.maximum(whole, 0, out=whole), 255, out=whole)


def _shear_x(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    return shear_or_shift(image, factor, 0.0, vertical=False, **options)


def _shear_y(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    return shear_or_shift(image, factor, 0.0, vertical=True, **options)


def _translate_x(image: Image.Image, share: float, **options: Any) -> Image.Image:
    return shear_or_shift(image, 0.0, share * image.width, vertical=False, **options)


def _translate_y(image: Image.Image, share: float, **options: Any) -> Image.Image:
    return shear_or_shift(image, 0.0, share * image.height, vertical=True, **options)


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = NAME_TO_OP["Posterize"](image, bits_to_keep, **options)
    return posterized


_OPERATIONS: dict[str, Callable[..., Image.Image]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
}


def _central_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _noise_pool_size(input_size: int) -> int:
    return max(_MIN_NOISE_POOL, 4 * 3 * input_size * input_size)


def _check_input_size(input_size: int) -> None:
    if input_size < 1:
        raise UserError(f"input_size={input_size} is no size of a picture; give 224, for example")
