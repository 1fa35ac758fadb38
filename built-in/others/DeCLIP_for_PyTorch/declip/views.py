"""Pictures for training and evaluation, as the published recipes make them.

Recipe: https://github.com/Sense-GVT/DeCLIP (Apache-2.0) at 9d9e25d, prototype/data:
``MOCOV2`` for DeCLIP (Chen et al., https://arxiv.org/abs/2003.04297), ``STANDARD_SLIP`` for CLIP,
``ONECROP`` for evaluation; upstream builds on torchvision's transforms of Pillow images. The same
decisions are drawn from the same generators in the same order, and from the same numbers a
picture equals upstream's, up to this:

- The resize runs in torch where torch has a fast one (x86 with AVX2), three times as fast as
  Pillow's. Its integer weights are coarser: of photographs of 500 x 375, 5 % of the values differ
  by one grey level of 255, one in 15 million by two. Colours and blur come after it and carry that
  on: in DeCLIP's views 3.5 % of the values differ by one level, 0.46 % by two to ten. Elsewhere
  the resize is Pillow's, as upstream's.
- Colours and blur are Pillow's integer and float32 operations in numpy, plane by plane, in a
  quarter to two thirds of its time and with equal results.
- Evaluation of an image over 8 times as long as wide resizes only the middle, which is all that
  is looked at: all of a 1 x 5000 image would become a gigabyte.
- A truncated JPEG is damaged; upstream takes it with a grey remainder.

Nothing is normalised here: the model does that on the device.

Shape letters: V views of a picture, C channels (RGB), H W pixels, S = side of a view, K numbers
of a table.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.transforms import ColorJitter, RandomResizedCrop

from zoo_common.data import Pixels
from zoo_common.errors import UserError

Planes = NDArray[np.uint8]

CROP_RATIO = (3 / 4, 4 / 3)
"""Width / height of a crop: from, to."""

BLUR_SIGMA = (0.1, 2.0)
"""Standard deviation of the blur in pixels: from, to."""

EVAL_SHORT_SIDE = 256 / 224
"""Short side of a resized evaluation image, by the side of the crop that is taken from it."""

_MAX_ASPECT = 8
_BLUR_PASSES = 3
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


class Jitter(NamedTuple):
    """Changes of colour, as ``torchvision.transforms.ColorJitter`` draws them.

    Attributes:
        order: The four changes in the order in which they are made.
        factors: By change, what it multiplies with; for hue the turn it adds. None: left out.
    """

    order: tuple[int, ...]
    factors: tuple[float | None, ...]


class Decisions(NamedTuple):
    """All that is drawn for one view.

    Attributes:
        box: The crop's top, left, height and width in pixels.
        jitter: Changes of colour, if any.
        gray: Whether the colours go.
        sigma: The blur's standard deviation in pixels, if there is one.
        flip: Whether left and right change places.
    """

    box: tuple[int, int, int, int]
    jitter: Jitter | None
    gray: bool
    sigma: float | None
    flip: bool


class OneView:
    """One random view of a picture.

    With the defaults, that of upstream's CLIP: a crop and nothing else. What has probability 0 is
    not drawn either.

    Args:
        input_size: Side of a view in pixels.
        crop_min: The least area of a crop, as a share of the picture's.
        color_jitter: Strength of the change of brightness, contrast and saturation.
        hue: The largest change of hue, in turns.
        jitter_probability: Probability that colours change.
        gray: Probability of a view without colours.
        blur: Probability of a blurred view.
        flip: Probability that left and right change places.

    Raises:
        UserError: A value out of its range.
    """

    views = 1

    def __init__(
        self,
        input_size: int = 224,
        *,
        crop_min: float = 0.5,
        color_jitter: float = 0.0,
        hue: float = 0.0,
        jitter_probability: float = 0.0,
        gray: float = 0.0,
        blur: float = 0.0,
        flip: float = 0.0,
    ) -> None:
        _check_input_size(input_size)
        if not 0 < crop_min <= 1:
            raise UserError(f"crop_min={crop_min} is no share of an area; give one up to 1")
        if color_jitter < 0:
            raise UserError(f"color_jitter={color_jitter} is negative; give 0 to switch it off")
        if not 0 <= hue <= 0.5:
            raise UserError(f"hue={hue} is no change of hue in turns; give one from 0 to 0.5")
        probabilities = {
            "jitter_probability": jitter_probability,
            "gray": gray,
            "blur": blur,
            "flip": flip,
        }
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value} is no probability; give a value from 0 to 1")
        self.input_size = input_size
        self._crop_area = [crop_min, 1.0]
        self._factors = [max(0.0, 1 - color_jitter), 1 + color_jitter] if color_jitter else None
        self._turns = [-hue, hue] if hue else None
        self._jitter, self._gray, self._blur, self._flip = probabilities.values()

    def __call__(self, image: Image.Image) -> Planes:
        """Makes an RGB image into views [V, C, S, S]."""
        views_VCSS = np.empty((self.views, 3, self.input_size, self.input_size), np.uint8)
        source = Crops(image)
        for view_CSS in views_VCSS:
            drawn = self.draw(image)
            planes_CSS = source.crop(drawn.box, self.input_size, drawn.flip)
            if drawn.jitter is not None:
                planes_CSS = jitter_colors(planes_CSS, drawn.jitter)
            if drawn.gray:
                planes_CSS = luma(planes_CSS)[None]
            if drawn.sigma is not None:
                planes_CSS = gaussian_blur(planes_CSS, drawn.sigma)
            view_CSS[:] = planes_CSS
        return views_VCSS

    def draw(self, image: Image.Image) -> Decisions:
        """Draws what becomes of a view from torch's and Python's generators, in upstream's order.

        Nothing that is drawn depends on a pixel, so all of it comes before the first operation.
        """
        box = RandomResizedCrop.get_params(image, self._crop_area, list(CROP_RATIO))
        jitter = None
        if _happens(self._jitter):
            order, *factors = ColorJitter.get_params(
                self._factors, self._factors, self._factors, self._turns
            )
            jitter = Jitter(tuple(order.tolist()), tuple(factors))
        gray = _happens(self._gray)
        sigma = random.uniform(*BLUR_SIGMA) if _happens(self._blur) else None
        return Decisions(box, jitter, gray, sigma, flip=_happens(self._flip))


class TwoViews(OneView):
    """Two random views of a picture, one drawn after the other, as upstream's DeCLIP has them.

    Arguments and errors are those of ``OneView``.
    """

    views = 2

    def __init__(
        self,
        input_size: int = 224,
        *,
        crop_min: float = 0.2,
        color_jitter: float = 0.4,
        hue: float = 0.1,
        jitter_probability: float = 0.8,
        gray: float = 0.2,
        blur: float = 0.5,
        flip: float = 0.5,
    ) -> None:
        super().__init__(
            input_size,
            crop_min=crop_min,
            color_jitter=color_jitter,
            hue=hue,
            jitter_probability=jitter_probability,
            gray=gray,
            blur=blur,
            flip=flip,
        )


class EvalTransform:
    """An evaluation picture: resize by the short side, central crop; equal to upstream's.

    Args:
        input_size: Side of the picture in pixels.
    """

    def __init__(self, input_size: int = 224) -> None:
        _check_input_size(input_size)
        self._size = input_size
        self._short = math.floor(input_size * EVAL_SHORT_SIDE)

    def __call__(self, image: Image.Image) -> Pixels:
        """Makes an RGB image into uint8 [H, W, C]."""
        short = min(image.size)
        if max(image.size) > _MAX_ASPECT * short:
            image = _central_crop(image, *(min(s, _MAX_ASPECT * short) for s in image.size))
        width, height = (int(self._short * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return Pixels(np.asarray(_central_crop(image, self._size, self._size)))


class Crops:
    """A decoded picture of which several crops are resized; see the header for the resize."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._pixels_HW4: torch.Tensor | None = None
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            # Pillow stores four bytes a pixel: so they are copied as they are, and torch is twice
            # as fast with four channels as with three.
            packed = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
            self._pixels_HW4 = packed.view(image.height, image.width, 4)

    def crop(self, box: tuple[int, int, int, int], size: int, flip: bool) -> Planes:
        """A crop [C, S, S], bilinear with antialiasing, and its columns in reverse to flip it."""
        top, left, height, width = box
        if self._pixels_HW4 is None:
            cropped = self._image.crop((left, top, left + width, top + height))
            resized_SSC = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
        else:
            crop_1CHW = self._pixels_HW4[top : top + height, left : left + width].permute(2, 0, 1)
            resized_1CSS = nn.functional.interpolate(
                crop_1CHW[None], (size, size), mode="bilinear", antialias=True
            )
            resized_SSC = resized_1CSS[0].permute(1, 2, 0).numpy()[..., :3]
        # All that follows treats a pixel by itself or is symmetric, and may come after the flip.
        mirrored_SSC = resized_SSC[:, ::-1] if flip else resized_SSC
        return np.ascontiguousarray(mirrored_SSC.transpose(2, 0, 1))


# ---------------------------------------------------------------------------- colours


def jitter_colors(planes_CHW: Planes, jitter: Jitter) -> Planes:
    """Changes brightness, contrast, saturation and hue in the order that was drawn."""
    for change in jitter.order:
        factor = jitter.factors[change]
        if factor is None:
            continue
        if change == _BRIGHTNESS:
            planes_CHW = _blend(np.float32(0), planes_CHW, factor)
        elif change == _CONTRAST:
            mean = int(luma(planes_CHW).mean(dtype=np.float64) + 0.5)
            planes_CHW = _blend(np.float32(mean), planes_CHW, factor)
        elif change == _SATURATION:
            planes_CHW = _blend(luma(planes_CHW).astype(np.float32), planes_CHW, factor)
        else:
            planes_CHW = turn_hue(planes_CHW, factor)
    return planes_CHW


def luma(planes_CHW: Planes) -> Planes:
    """Brightness [H, W] of red, green and blue, by Pillow's integer weights (ITU-R 601-2)."""
    red_HW, green_HW, blue_HW = planes_CHW
    sum_HW: NDArray[np.uint32] = np.multiply(red_HW, 19595, dtype=np.uint32)
    sum_HW += np.multiply(green_HW, 38470, dtype=np.uint32)
    sum_HW += np.multiply(blue_HW, 7471, dtype=np.uint32)
    sum_HW += 0x8000
    sum_HW >>= 16
    return sum_HW.astype(np.uint8)


def turn_hue(planes_CHW: Planes, turns: float) -> Planes:
    """Turns the hue as Pillow does by way of 8-bit hue, saturation and value.

    Args:
        planes_CHW: Red, green, blue.
        turns: What to add to the hue; 1 is once around.
    """
    red_HW, green_HW, blue_HW = planes_CHW
    value_HW = np.maximum(np.maximum(red_HW, green_HW), blue_HW)
    lowest_HW = np.minimum(np.minimum(red_HW, green_HW), blue_HW)
    chroma_HW = value_HW - lowest_HW
    # Sums modulo 256: the middle one of the three is what the others leave.
    below_HW = value_HW - (red_HW + green_HW + blue_HW - value_HW - lowest_HW)
    order_HW = (red_HW < green_HW).view(np.uint8)
    order_HW = order_HW | (green_HW < blue_HW).view(np.uint8) << 1
    order_HW |= (blue_HW < red_HW).view(np.uint8) << 2
    chroma_index_HW = np.left_shift(chroma_HW, 8, dtype=np.intp)
    hue_K, saturation_K = _hue_tables()
    saturation_HW = saturation_K.take(chroma_index_HW | value_HW)
    chroma_index_HW |= below_HW
    chroma_index_HW |= np.left_shift(order_HW, 16, dtype=np.intp)
    hue_HW = hue_K.take(chroma_index_HW)
    hue_HW += np.int32(turns * 255).astype(np.uint8)  # modulo 256, as torchvision has it

    # In units of 1/255: six sectors of hue, and how far each channel stays below the value.
    sector_HW = np.multiply(hue_HW, 6, dtype=np.int16)
    depth_HW = np.multiply(value_HW, saturation_HW, dtype=np.float32)
    shares = (
        510 - np.abs(sector_HW - 765),
        np.abs(sector_HW - 510) - 255,
        np.abs(sector_HW - 1020) - 255,
    )
    out_CHW = np.empty_like(planes_CHW)
    for out_HW, share_HW in zip(out_CHW, shares, strict=True):
        np.clip(share_HW, 0, 255, out=share_HW)
        lost_HW = depth_HW * share_HW
        lost_HW /= 65025
        np.rint(lost_HW, out=lost_HW)
        np.subtract(value_HW, lost_HW.astype(np.uint8), out=out_HW)
    return out_CHW


@functools.cache
def _hue_tables() -> tuple[Planes, Planes]:
    """Pillow's 8-bit hue and saturation, asked from Pillow.

    Returns:
        Hue by (order of the channels, highest - lowest, highest - middle), the order as
        ``turn_hue`` counts it; saturation by (highest - lowest, highest); both flat.
    """
    chroma_KK, other_KK = np.indices((256, 256), dtype=np.uint8)
    levels = (np.full_like(chroma_KK, 255), 255 - other_KK, 255 - chroma_KK)
    hue_8KK = np.zeros((8, 256, 256), np.uint8)
    for ranks in itertools.permutations(range(3)):
        red, green, blue = ranks  # 0: the highest
        order = (red > green) | (green > blue) << 1 | (blue > red) << 2
        pixels_KKC = np.stack([levels[rank] for rank in ranks], axis=-1)
        hue_8KK[order] = np.asarray(Image.fromarray(pixels_KKC).convert("HSV"))[..., 0]
    lowest_KK = np.maximum(other_KK, chroma_KK) - chroma_KK
    pixels_KKC = np.stack([other_KK, lowest_KK, lowest_KK], axis=-1)
    saturation_KK = np.asarray(Image.fromarray(pixels_KKC).convert("HSV"))[..., 1]
    return hue_8KK.ravel(), saturation_KK.ravel()


def _blend(base: np.float32 | NDArray[np.float32], planes_CHW: Planes, factor: float) -> Planes:
    """``base + factor * (planes - base)`` in [0, 255], cut to whole numbers, as Pillow blends."""
    blended_CHW = np.subtract(planes_CHW, base, dtype=np.float32)
    blended_CHW *= np.float32(factor)
    blended_CHW += base
    if factor > 1:
        np.clip(blended_CHW, 0, 255, out=blended_CHW)
    return blended_CHW.astype(np.uint8)


# ---------------------------------------------------------------------------- blur


def gaussian_blur(planes_CHW: Planes, sigma: float) -> Planes:
    """Pillow's Gaussian blur: three box blurs by rows, then three by columns.

    A box blur weighs the 2 r + 1 pixels around one alike, and the two beyond them by what is
    missing to the wanted width; pixels beyond the edge repeat it. See Gwosdek et al.,
    https://www.mia.uni-saarland.de/Publications/gwosdek-ssvm11.pdf

    Args:
        planes_CHW: Any number of planes.
        sigma: Standard deviation in pixels.
    """
    radius, inner, outer = _box_weights(sigma)
    planes, height, width = planes_CHW.shape
    pad = radius + 1
    rows_CHW = np.empty((planes, height, width + 2 * pad), np.uint8)
    rows_CHW[..., pad:-pad] = planes_CHW
    # Rows stand one behind the other with their pads between them, so that one long line is
    # blurred; the pads, which then hold a mix of two rows, are made anew.
    line_N = rows_CHW.reshape(-1)
    for _ in range(_BLUR_PASSES):
        rows_CHW[..., :pad] = rows_CHW[..., pad : pad + 1]
        rows_CHW[..., -pad:] = rows_CHW[..., -pad - 1 : -pad]
        line_N[pad:-pad] = _box_blur(line_N, radius, inner, outer)
    columns_CHW = np.empty((planes, height + 2 * pad, width), np.uint8)
    columns_CHW[:, pad:-pad] = rows_CHW[..., pad:-pad]
    for plane_HW in columns_CHW:
        line_N = plane_HW.reshape(-1)
        for _ in range(_BLUR_PASSES):
            plane_HW[:pad] = plane_HW[pad]
            plane_HW[-pad:] = plane_HW[-pad - 1]
            line_N[pad * width : -pad * width] = _box_blur(line_N, radius, inner, outer, width)
    return columns_CHW[:, pad:-pad]


def _box_blur(
    line_N: NDArray[np.uint8], radius: int, inner: int, outer: int, stride: int = 1
) -> NDArray[np.uint32]:
    """One box blur along a line of which every ``stride``-th value is a neighbour.

    Returns:
        The values between the pads of ``(radius + 1) * stride`` at either end.
    """
    count = len(line_N) - 2 * (radius + 1) * stride

    def shifted(steps: int) -> NDArray[np.uint8]:
        begin = (radius + 1 + steps) * stride
        return line_N[begin : begin + count]

    sum_N = np.add(shifted(-radius - 1), shifted(radius + 1), dtype=np.uint16)
    blurred_N = np.multiply(sum_N, outer, dtype=np.uint32)
    if radius:
        sum_N = shifted(0).astype(np.uint16)
        for steps in range(1, radius + 1):
            sum_N += shifted(-steps)
            sum_N += shifted(steps)
        blurred_N += np.multiply(sum_N, inner, dtype=np.uint32)
    else:
        blurred_N += np.multiply(shifted(0), inner, dtype=np.uint32)
    blurred_N += 1 << 23
    blurred_N >>= 24
    return blurred_N


def _box_weights(sigma: float) -> tuple[int, int, int]:
    """The box of one of the passes that together blur by ``sigma``, in Pillow's float32.

    Returns:
        Its radius in whole pixels; the weights, in units of 2 ** -24, of a pixel inside and of
        one just outside of it.
    """
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(_BLUR_PASSES)
    length = np.float32(math.sqrt(12 * float(variance) + 1))
    whole = np.float32((length - 1) // 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    radius = int(whole + part)
    inner = int(np.float32(1 << 24) / (2 * (whole + part) + 1))
    return radius, inner, ((1 << 24) - (2 * radius + 1) * inner) // 2


def _happens(probability: float) -> bool:
    """Draws from torch's generator, unless the probability is 0."""
    return probability > 0 and torch.rand(1).item() < probability


def _central_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _check_input_size(input_size: int) -> None:
    if input_size < 1:
        raise UserError(f"input_size={input_size} is no size of a picture; give 224, for example")
