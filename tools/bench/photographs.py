"""JPEGs for benches of input pipelines: noise whose amplitude falls with frequency, as in photos.

Shape letters: H W pixels, C channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375


def draw_photographs(directory: Path, count: int) -> float:
    """Draws JPEGs of quality 90, WIDTH x HEIGHT, always the same ones.

    Returns:
        Their mean size in bytes.
    """
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1e-9) ** -1.2, 0)
    total = 0
    for number in range(count):
        noise = rng.standard_normal((3, *frequency.shape, 2)) @ np.array([1, 1j])
        fields_CHW = np.fft.irfft2(noise * amplitude, s=(HEIGHT, WIDTH))
        light, warm, green = fields_CHW / fields_CHW.std(axis=(1, 2), keepdims=True)
        channels = [light + 0.35 * warm, light - 0.2 * warm + 0.1 * green, light - 0.35 * warm]
        pixels_HWC = np.stack(channels, axis=-1) * 48 + rng.uniform(90, 150)
        path = directory / f"{number:04}.jpg"
        Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    return total / count
