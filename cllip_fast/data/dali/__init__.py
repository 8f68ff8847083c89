"""The loader that decodes with DALI, on a GPU or without one: the plain loader's batches but for the decoder's pixels.

    workers          read by offset, check, choose windows, captions and regions, tokenise (`encode.py`, with the plain
                     loader's assembler); Pillow decodes there what is no plain JPEG (`jpeg.py`)
    this process     feeds encoded bytes and windows to DALI's threads or GPU (`pipeline.py`), one batch ahead
                     (`batches.py`)

DALI's own readers shuffle in a buffer, and can neither resume in the middle of an epoch nor mix data sets by weight. So
only decoding is DALI's: samples, order, substitutes and state are the plain loader's objects, and the price is that
encoded bytes pass through Python's memory. What is decoded goes to torch without a copy.

A batch of B samples is decoded in R runs of n = ⌈B / R⌉; DALI's queue is R + 1 runs deep, so that while a batch is
used, the whole next one is under way. With workers = 0 reading and tokenising happen between two batches instead.

Memory in bytes, with F encoded bytes a sample, side S, element size e (4 for bf16, which torch rounds from fp32), L and
Lr tokens, M regions, w workers:

    host       F B (2 + 2 w)                       two batches with DALI, two a worker ready
    pinned     2 F B + B (8 L + M (8 Lr + 17))     a GPU: DALI's copies of the files, texts and boxes
    decoded    3 · max_decoded_pixels · n ≤ decode_memory at the most, whatever the images; on the device. A GPU may
               decode one run while it resizes another, twice that. DALI keeps what it once took
    ready      3 S² e n (R + 1), on the device, and the batches that the caller holds

To which come the decoders' own tables and scratch, which DALI states nowhere.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from cllip_fast import extras
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD, Loader, create_loader
from cllip_fast.errors import InputError

__all__ = ["DaliLoader", "create_dali_loader"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def create_dali_loader(
    spec: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    threads: int = 4,
    decode_memory: int = 1 << 32,
    max_decoded_pixels: int = 1 << 22,
    **settings: Any,
) -> DaliLoader:
    """`create_loader` with DALI. The same arguments give the same samples, texts, boxes and state.

    Pixels are bicubic with antialiasing, as there, and differ by the decoder: photographs on a CPU from Pillow's full
    result by under 0.5 of 255 levels in the mean, 3 at the 99th and 10 at the 99.9th percentile, the largest at the
    picture's own edges, where DALI repeats the last pixel (tests/data/test_data_dali.py). Where less than some ten
    pixels fill the square, those edges are all of it.

    Args:
        device: "cpu", or the GPU that decodes and holds the batches.
        dtype: of the images: float32, float16 or bfloat16.
        channels_last: lay the images out in memory as [B, S, S, 3]; their shape stays [B, 3, S, S].
        threads: DALI's threads in this process.
        decode_memory: bytes that whole decoded images of one run may take; a batch is cut into as many runs as needed.
        max_decoded_pixels: an image with more goes to Pillow, which decodes large JPEGs at a fraction of their size.
        settings: the other arguments of `create_loader`.

    Raises:
        InputError: as `create_loader`; DALI or the GPU is not there; or an argument is out of range.
    """
    extras.require("dali", "create_dali_loader")
    from cllip_fast.data.dali.batches import DaliBatches
    from cllip_fast.data.dali.encode import Encoder
    from cllip_fast.data.dali.pipeline import Settings

    device = _check_device(device)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, value in (("threads", threads), ("max_decoded_pixels", max_decoded_pixels)):
        if value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    if decode_memory < 3 * max_decoded_pixels:
        raise InputError(
            f"decode_memory is {decode_memory}, expected at least 3 bytes a pixel of max_decoded_pixels "
            f"{max_decoded_pixels}"
        )
    parts = create_loader(spec, **settings).parts
    batch_size = settings["batch_size"]
    runs = math.ceil(batch_size / (decode_memory // (3 * max_decoded_pixels)))
    decoding = Settings(
        side=settings["image_size"],
        mean=tuple(settings.get("mean", CLIP_MEAN)),
        std=tuple(settings.get("std", CLIP_STD)),
        dtype=dtype,
        channels_last=channels_last,
        device=device,
        threads=threads,
        run_size=math.ceil(batch_size / runs),
        depth=runs + 1,
    )
    encoder = Encoder(parts.assembler, max_decoded_pixels)
    batches = DaliBatches(encoder, parts.order, decoding, settings.get("workers", 0), settings.get("pin_memory", False))
    return DaliLoader(parts, batches, f"dali {extras.probe('dali')} ({device})")


def _check_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device}, expected cpu or cuda")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device is {device}, but no GPU can be used here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


class DaliLoader(Loader):
    """A `Loader` whose images DALI decodes; made by `create_dali_loader`."""

    @property
    def by_pillow(self) -> Counter[str]:
        """Images of the batches so far that Pillow decoded on the CPU, by why they were not for DALI."""
        return self._batches.by_pillow
