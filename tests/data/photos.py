"""Pictures with the spectrum of photographs, and image files of unusual kinds."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: noise whose amplitude falls as 1 / frequency, as in natural images, and some edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    layers = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        layers.append(np.fft.irfft2(phase / frequency, s=(height, width)))
    pixels = np.stack(layers, axis=2)
    pixels = 128 + 45 * (0.8 * pixels.mean(2, keepdims=True) + 0.2 * pixels) / pixels.std()
    for _ in range(6):
        x, y = rng.integers(0, width), rng.integers(0, height)
        pixels[y : y + height // 4, x : x + width // 5] += rng.normal(0, 40, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()
