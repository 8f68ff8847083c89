"""Image bytes to the pixels of one window: sizes checked in the header, JPEGs decoded no larger than needed.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size by leaving out high frequencies of its blocks (Pillow's "draft",
libjpeg's DCT scaling). The smallest that stays twice as fine as needed (`crop.MARGIN`) is taken and resized from there.
Pillow and simplejpeg are both libjpeg-turbo and decode the same sizes, so that the choice between them is one of
speed; neither can decode a part of a picture alone.

Pixels are those of the file as stored: an EXIF orientation is ignored, as boxes refer to stored pixels (OpenCLIP
ignores it too). Grey, CMYK and palettes become RGB, transparency is dropped (what lies beneath shows), 16 bits keep
the upper 8.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from cllip_fast import extras
from cllip_fast.data.crop import Window, reduction
from cllip_fast.errors import check_choice

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DECODERS = ("auto", "pillow", "simplejpeg")
MAX_PIXELS = 1 << 26  # 67 million; 3 bytes each when decoded whole, as PNG always is


class ImageError(Exception):
    """An image that cannot be used; `kind` is the name under which it is counted."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Decoder:
    """Decodes windows of images with the library of its choice; can be copied into other processes.

    Attributes:
        name: "pillow" or "simplejpeg", which leaves to Pillow what is no plain JPEG.
        max_pixels: of an image; one with more is refused.
    """

    def __init__(self, name: str = "auto", max_pixels: int = MAX_PIXELS) -> None:
        """`name` of `DECODERS`; "auto" is simplejpeg where it is installed. `InputError` if it is not there."""
        check_choice("decoder", name, DECODERS)
        if name == "simplejpeg":
            extras.require("simplejpeg", "decoder 'simplejpeg'")
        self.name = name if name != "auto" else "simplejpeg" if simplejpeg else "pillow"
        self.max_pixels = max_pixels

    def fill(self, data: bytes, size: tuple[int, int], window: Window, padding: np.ndarray, square: np.ndarray) -> None:
        """Decode a window into a square.

        Args:
            data: a JPEG or PNG file.
            size: width and height that the image must have, as boxes refer to them.
            window: part of the image, and where it goes in the square.
            padding: uint8 [3], the colour of what the window leaves of the square.
            square: uint8 [side, side, 3], written to.

        Raises:
            ImageError: the image has another size, too many pixels, or cannot be decoded.
        """
        if size[0] * size[1] > self.max_pixels:
            raise ImageError("too many pixels", f"{size[0]}×{size[1]}, expected at most {self.max_pixels} pixels")
        left, top, right, bottom = window.target
        if window.target != (0, 0, square.shape[1], square.shape[0]):
            square[...] = padding
        try:
            square[top:bottom, left:right] = self._part(data, size, window.source, (right - left, bottom - top))
        except ImageError:
            raise
        except UnidentifiedImageError as error:  # its own message is the address of an object
            raise ImageError("broken image", "no header of a JPEG or PNG file") from error
        except Exception as error:  # a damaged image makes Pillow fail in many ways, and none may end a long run
            raise ImageError("broken image", f"{type(error).__name__}: {error}") from error

    def _part(
        self, data: bytes, size: tuple[int, int], source: tuple[int, int, int, int], target: tuple[int, int]
    ) -> np.ndarray:
        """uint8 [height, width, 3] of `target` size, from the rectangle `source` of the image."""
        x0, y0, x1, y1 = source
        factor = reduction(x1 - x0, y1 - y0, *target)
        pixels = _by_simplejpeg(data, size, factor) if self.name == "simplejpeg" else None
        if pixels is None:
            pixels = _by_pillow(data, size, factor)
        if pixels.shape[1::-1] == size:  # no JPEG, or no need to reduce
            factor = 1
        if any(edge % factor for edge in source):
            # The picture's last pixel may lie partly outside: the scale is 1 / factor, whatever the sizes.
            box = tuple(edge / factor for edge in source)
            return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC, box=box))
        part = pixels[y0 // factor : y1 // factor, x0 // factor : x1 // factor]
        return part if part.shape[1::-1] == target else _resize(part, target)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3] by Pillow's bicubic filter, but for rounding, in PyTorch's several times faster form."""
    pixels = pixels if pixels.flags.writeable else pixels.copy()  # PyTorch warns of what it could write to
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size[::-1], mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _by_pillow(data: bytes, size: tuple[int, int], factor: int) -> np.ndarray:
    """uint8 [height, width, 3], 1 / `factor` as large if it is a JPEG."""
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))  # reads the header only
    _check_size(image.size, size)
    if factor > 1:
        image.draft(None, (size[0] // factor, size[1] // factor))
    if image.mode.startswith("I;16"):  # convert would clip to white, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _by_simplejpeg(data: bytes, size: tuple[int, int], factor: int) -> np.ndarray | None:
    """The same; None for what is no JPEG of grey or three colours, or none that libjpeg reads without a complaint.

    Pillow then has the last word, so that both leave out the same images.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size((width, height), size)
        if colours in ("CMYK", "YCCK"):
            return None
        smallest = {"min_width": -(-width // factor), "min_height": -(-height // factor)} if factor > 1 else {}
        return simplejpeg.decode_jpeg(data, "RGB", **smallest)
    except ValueError:
        return None


def _check_size(found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        detail = f"image {found[0]}×{found[1]}, record {expected[0]}×{expected[1]}"
        raise ImageError("size differs from record", detail)
