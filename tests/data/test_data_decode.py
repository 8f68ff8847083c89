"""Decoding: close to full Pillow whatever is skipped, the same with either library, and every kind of file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from cllip_fast import extras
from cllip_fast.data import decode
from cllip_fast.data.crop import CROPS, Window, choose_window
from cllip_fast.data.decode import Decoder, ImageError
from cllip_fast.errors import InputError
from tests.data.painted import record, write_shard
from tests.data.photos import encoded, photo

BLACK = np.zeros(3, dtype=np.uint8)
LIBRARIES = [
    "pillow",
    pytest.param("simplejpeg", marks=pytest.mark.skipif(not decode.simplejpeg, reason="simplejpeg is not installed")),
]


def decoder(library: str, **options: int) -> Decoder:
    made = Decoder("auto" if library == "simplejpeg" else library, **options)
    assert made.name == library
    return made


def ours(library: str, data: bytes, size: tuple[int, int], window: Window, side: int) -> np.ndarray:
    square = np.zeros((side, side, 3), dtype=np.uint8)
    decoder(library).fill(data, size, window, BLACK, square)
    return square


def full(data: bytes, window: Window, side: int) -> np.ndarray:
    """Everything decoded and resized by Pillow's bicubic filter."""
    square = np.zeros((side, side, 3), dtype=np.uint8)
    left, top, right, bottom = window.target
    image = Image.open(io.BytesIO(data)).convert("RGB")
    part = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=window.source)
    square[top:bottom, left:right] = np.asarray(part)
    return square


def differences(library: str, files: list[tuple[bytes, tuple[int, int]]], side: int, crop: str) -> np.ndarray:
    """|ours - full Pillow| in levels of 255, [image, values]."""
    rows = []
    for number, (data, size) in enumerate(files):
        window = choose_window(crop, *size, side, seed=0, epoch=0, key=str(number))
        mine, reference = ours(library, data, size, window, side), full(data, window, side)
        rows.append(np.abs(mine.astype(int) - reference).ravel())
    return np.stack(rows)


def check_close(found: np.ndarray) -> None:
    """The bounds that the loader promises."""
    assert found.mean() <= 1.0
    assert found.mean(1).max() <= 1.5, "of any one image"
    assert np.percentile(found, 99) <= 4
    assert np.percentile(found, 99.9) <= 8


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("side", "sizes"), [(24, [(500, 375), (333, 517)]), (96, [(500, 375), (1203, 901)])])
def test_pixels_are_those_of_full_pillow_within_bounds(library, crop, side, sizes):
    files = [(encoded(photo(*size, seed=n)), size) for n, size in enumerate(sizes)]
    check_close(differences(library, files, side, crop))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("side", [64, 224])
def test_photographs_stay_within_the_same_bounds(coco, library, side):
    files = [(path.read_bytes(), Image.open(path).size) for path in sorted((coco / "images").glob("*.jpg"))[::40]]
    check_close(differences(library, files, side, "random"))


def test_a_large_jpeg_is_decoded_small_and_a_small_one_whole(monkeypatch):
    seen = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, *args: (draft(self, *args), seen.append(self.size)))
    for width, expected in ((350, []), (400, [(200, 150)]), (800, [(200, 150)]), (1601, [(201, 150)])):
        seen.clear()
        size = (width, width * 3 // 4)
        ours("pillow", encoded(photo(*size)), size, choose_window("pad", *size, 90, seed=0, epoch=0, key="k"), 90)
        assert seen == expected, "the smallest that is twice as fine as the square"


@pytest.mark.skipif(not decode.simplejpeg, reason="simplejpeg is not installed")
@pytest.mark.parametrize("side", [32, 100, 300])
def test_both_libraries_give_the_same_pixels(side):
    for size in ((501, 377), (1200, 900)):
        for quality, subsampling in ((95, 0), (80, 2)):
            data = encoded(photo(*size), quality=quality, subsampling=subsampling)
            window = choose_window("random", *size, side, seed=0, epoch=0, key="k")
            one, other = (ours(name, data, size, window, side).astype(int) for name in ("pillow", "simplejpeg"))
            assert np.abs(one - other).max() <= 1


def grey_of_16_bits() -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1)))


def palette_with_transparency() -> bytes:
    image = Image.fromarray(photo(32, 32)).quantize(16)
    return encoded(image, "PNG", transparency=bytes([0, 128] + [255] * 14))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_kind_of_image_becomes_rgb(library):
    colours = Image.fromarray(photo(32, 32))
    alpha = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    kinds = {
        "cmyk": encoded(colours.convert("CMYK")),
        "grey": encoded(colours.convert("L")),
        "grey png": encoded(colours.convert("L"), "PNG"),
        "one bit": encoded(colours.convert("1"), "PNG"),
        "alpha": encoded(Image.merge("RGBA", [*colours.split(), alpha]), "PNG"),
        "grey alpha": encoded(Image.merge("LA", [colours.convert("L"), alpha]), "PNG"),
        "palette": encoded(colours.quantize(16), "PNG"),
        "palette with transparency": palette_with_transparency(),
        "progressive": encoded(colours, progressive=True),
    }
    window = Window((0, 0, 32, 32), (0, 0, 32, 32))
    for name, data in kinds.items():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB"))
        np.testing.assert_array_equal(ours(library, data, (32, 32), window, 32), expected, err_msg=name)
    ramp = ours(library, encoded(grey_of_16_bits(), "PNG"), (32, 32), window, 32)
    np.testing.assert_array_equal(ramp[0, :, 0], np.linspace(0, 65535, 32).astype(np.uint16) >> 8)


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_exif_orientation_is_ignored_as_boxes_refer_to_stored_pixels(library):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    pixels = photo(48, 32)
    turned, plain = encoded(Image.fromarray(pixels), exif=exif.tobytes()), encoded(pixels)
    window = choose_window("pad", 48, 32, 48, seed=0, epoch=0, key="k")
    np.testing.assert_array_equal(*(ours(library, data, (48, 32), window, 48) for data in (turned, plain)))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("claimed", "recorded", "kind"),
    [
        ((9000, 9000), (9000, 9000), "too many pixels"),
        ((60000, 60000), (60000, 60000), "too many pixels"),
        ((9000, 9000), (90, 90), "size differs from record"),
        ((60000, 60000), (90, 90), "broken image"),  # Pillow's own limit, at the header as well
    ],
)
def test_huge_images_are_left_out_before_anything_is_decoded(monkeypatch, library, claimed, recorded, kind):
    def never(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(ImageError) as caught:
        ours(library, png_header(*claimed), recorded, Window((0, 0, 90, 90), (0, 0, 8, 8)), 8)
    assert caught.value.kind == kind


def test_the_limit_of_pixels_is_an_option(tmp_path, loader):
    write_shard(
        tmp_path, [("a", encoded(photo(40, 30)), record(40, 30)), ("b", encoded(photo(40, 31)), record(40, 31))]
    )
    made = loader(tmp_path, max_pixels=1200)
    assert [key for batch in made for key in batch.keys] == ["a"]
    assert made.skipped == {"too many pixels": 1}
    with pytest.raises(InputError, match="max_pixels is 100000000, expected at most Pillow's own limit"):
        loader(tmp_path, max_pixels=100_000_000)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("side", [16, 200])
def test_truncated_jpegs_are_broken_wherever_they_end(library, side):
    data = encoded(photo(200, 160))
    window = choose_window("pad", 200, 160, side, seed=0, epoch=0, key="k")
    for length in (0, 2, 100, len(data) // 2, len(data) - 100):
        with pytest.raises(ImageError) as caught:
            ours(library, data[:length], (200, 160), window, side)
        assert caught.value.kind == "broken image"


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_pillow_forgives_is_used(library):
    """Bytes between the segments make libjpeg complain, and Pillow not."""
    data = encoded(photo(64, 48))
    scan = data.index(b"\xff\xda")
    loud = data[:scan] + b"\x00" * 7 + data[scan:]
    window = choose_window("pad", 64, 48, 64, seed=0, epoch=0, key="k")
    np.testing.assert_array_equal(*(ours(library, each, (64, 48), window, 64) for each in (loud, data)))


def test_a_library_is_chosen_by_name_or_refused(tmp_path, loader):
    write_shard(tmp_path, [("a", encoded(photo(40, 30)), record(40, 30))])
    assert loader(tmp_path, decoder="pillow").decoder == "pillow"
    assert loader(tmp_path).decoder == ("simplejpeg" if decode.simplejpeg else "pillow")
    with pytest.raises(InputError, match="decoder is 'opencv', expected one of auto, pillow, simplejpeg"):
        loader(tmp_path, decoder="opencv")


@pytest.mark.skipif("simplejpeg" not in extras.report(), reason="simplejpeg is no entry of cllip_fast/extras.py yet")
def test_an_absent_library_is_refused(monkeypatch, tmp_path, loader):
    monkeypatch.setattr(extras, "probe", lambda name: None)
    write_shard(tmp_path, [("a", encoded(photo(40, 30)), record(40, 30))])
    with pytest.raises(InputError, match="decoder 'simplejpeg' needs simplejpeg"):
        loader(tmp_path, decoder="simplejpeg")
