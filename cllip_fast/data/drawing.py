"""Pixels of the generated scenes: masks of shapes, textures, backgrounds. Sizes are in pixels."""

from __future__ import annotations

import functools

import numpy as np

IMAGE_SIZE = 64
COLOUR_RGB = {
    "red": (214, 40, 40),
    "orange": (236, 118, 20),
    "yellow": (238, 222, 44),
    "green": (44, 168, 60),
    "cyan": (52, 214, 220),
    "blue": (48, 84, 226),
    "purple": (156, 56, 200),
    "white": (240, 240, 240),
}
_TEXTURE_VARIANTS = {"solid": 1, "striped": 4, "dotted": 2, "checkered": 2}
_TEXTURE_SIDE = 48  # the widest object and the largest shift


@functools.cache
def shape_mask(shape: str, width: int, height: int) -> np.ndarray:
    """Pixels of a shape as bool [height, width]; its first and last row and column each hold a pixel.

    Sides are 15 to 31 pixels. Tips get a little slack, or those that fall between two pixel centres would be cut off.
    """
    # Pixel centres in the square from -1 to 1, y upwards.
    x = (np.arange(width) * 2 + 1 - width) / width
    y = (height - 1 - np.arange(height) * 2)[:, None] / height
    radius = np.hypot(x, y)
    if shape == "circle":
        mask = radius <= 1
    elif shape == "square":
        mask = np.ones((height, width), dtype=bool)
    elif shape == "triangle":
        mask = np.abs(x) <= (1 - y) / 2 + 1 / width
    elif shape == "diamond":
        mask = np.abs(x) + np.abs(y) <= 1.03
    elif shape == "cross":
        mask = (np.abs(x) <= 0.36) | (np.abs(y) <= 0.36)
    elif shape == "star":
        mask = _star(x, y)
    elif shape == "ring":
        mask = (radius <= 1) & (radius >= 0.45)
    else:
        raise ValueError(f"shape is {shape!r}")
    mask.flags.writeable = False  # shared by every caller
    return mask


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five-pointed star that fills the square from -1 to 1."""
    x, y = np.broadcast_arrays(x * np.cos(np.pi / 10), (y + 1) * (1 + np.cos(np.pi / 5)) / 2 - np.cos(np.pi / 5))
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, y) + sector) % (2 * sector) - sector)  # to the nearest point
    # Within a sector the edge is the straight line from the point at radius 1 to the notch at radius `notch`.
    notch = 0.5
    edge = (
        notch * np.sin(sector) / (np.sin(angle) * (1 - notch * np.cos(sector)) + np.cos(angle) * notch * np.sin(sector))
    )
    return np.hypot(x, y) <= edge + 0.09


@functools.cache
def _texture_table(texture: str, variant: int) -> np.ndarray:
    """Bool [_TEXTURE_SIDE, _TEXTURE_SIDE], True where the texture shows its second colour."""
    row, column = np.indices((_TEXTURE_SIDE, _TEXTURE_SIDE))
    if texture == "solid":
        return np.zeros((_TEXTURE_SIDE, _TEXTURE_SIDE), dtype=bool)
    if texture == "striped":
        along = (column, row, (column + row) * 0.75, (column - row) * 0.75)[variant]
        return along % 5 >= 3
    if texture == "dotted":
        period = 6 + variant
        return np.hypot(row % period - 2.5, column % period - 2.5) < 1.7 + 0.2 * variant
    if texture == "checkered":
        cell = 3 + variant
        return (row // cell + column // cell) % 2 == 1
    raise ValueError(f"texture is {texture!r}")


def texture_pattern(texture: str, variant: int, shift: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Bool [h, w] for `shape` = (h, w): True where a texture shows its second colour, moved by `shift` < 12."""
    table = _texture_table(texture, variant % _TEXTURE_VARIANTS[texture])
    return table[shift[0] : shift[0] + shape[0], shift[1] : shift[1] + shape[1]]


def background(rng: np.random.Generator) -> np.ndarray:
    """A smooth gradient between four colours with blocks of noise, int16 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    corners = rng.integers(25, 175, size=(1, 3)) + rng.integers(-45, 46, size=(4, 3))
    image = (_corner_weights() @ corners).reshape(IMAGE_SIZE, IMAGE_SIZE, 3).astype(np.int16)
    block = 4 << int(rng.integers(3))
    strength = int(rng.integers(4, 25))
    side = IMAGE_SIZE // block
    blocks = rng.integers(-strength, strength + 1, size=(side, 1, side, 1, 3), dtype=np.int16)
    image.reshape(side, block, side, block, 3)[...] += blocks
    return image


@functools.cache
def _corner_weights() -> np.ndarray:
    """[pixels, 4] shares of the four corners' colours in each pixel."""
    along = np.linspace(0, 1, IMAGE_SIZE)
    ends = np.stack([1 - along, along], 1)
    return (ends[:, None, :, None] * ends[None, :, None, :]).reshape(IMAGE_SIZE**2, 4)


def paint(image: np.ndarray, left: int, top: int, mask: np.ndarray, second: np.ndarray, rgb: np.ndarray) -> None:
    """Draw an object onto int16 `image` [H, W, 3]: rows of `rgb` [2, 3] are its colour and its second colour."""
    window = image[top : top + mask.shape[0], left : left + mask.shape[1]]
    np.copyto(window, rgb[second.view(np.uint8)], where=mask[..., None])


def add_pixel_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 copy of int16 `image` with noise of a random strength on every pixel and channel."""
    strength = int(rng.integers(6, 19))
    noise = np.frombuffer(rng.bytes(image.size), dtype=np.int8).reshape(image.shape).astype(np.int16)
    noise *= strength
    noise >>= 7
    noise += image
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)
