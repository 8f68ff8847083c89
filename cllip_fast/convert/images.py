"""Image files on their way into a shard: found below their folder only, copied if JPEG, re-encoded if not."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

JPEG_QUALITY = 95
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class UnusableImageError(Exception):
    """An image that has to be skipped; the message is what it is counted as."""


def read_image(folder: Path, name: str) -> bytes:
    """The file `name` below `folder`.

    Raises:
        UnusableImageError: it is missing, or the name or a link on the way leads out of the folder.
    """
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UnusableImageError("images with a path outside the folder")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UnusableImageError("images without a file") from error


def list_images(folder: Path) -> list[str]:
    """Names of all image files below `folder`, sorted, with `/`."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def to_jpeg(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """A JPEG file and its width and height: `data` itself if it is one, else re-encoded at quality 95.

    Transparent pixels become white; of several frames the first is taken. Of a JPEG file only the header is read.

    Raises:
        UnusableImageError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.format in ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind it, as some cameras write
                return data, image.size
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
            return file.getvalue(), image.size
    except Exception as error:  # each of Pillow's formats fails in its own ways on a damaged file
        raise UnusableImageError("files that are no image") from error
