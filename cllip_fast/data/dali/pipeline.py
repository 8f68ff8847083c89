"""DALI's graph: decode a window, resize it, place it in its square, mirror, normalise. Needs the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from cllip_fast.data.dali.encode import Run


@dataclass(frozen=True)
class Settings:
    """What is the same for every picture; arguments as in `create_dali_loader`.

    Attributes:
        side: of the squares in pixels.
        run_size: pictures of a run at most.
        depth: runs under way at once.
    """

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    channels_last: bool
    device: torch.device
    threads: int
    run_size: int
    depth: int


def build(settings: Settings, source: Callable[[], Run]) -> Pipeline:
    """A pipeline that asks `source` for one run after another until it raises StopIteration."""
    on_gpu = settings.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=settings.run_size,
        num_threads=settings.threads,
        device_id=settings.device.index if on_gpu else None,
        prefetch_queue_depth=settings.depth,
        exec_dynamic=True,  # outputs live as long as they are held, which lets torch take them without a copy
    )
    with pipeline:
        pipeline.set_outputs(_graph(settings, source, on_gpu))
    pipeline.build()
    return pipeline


def _graph(settings: Settings, source: Callable[[], Run], on_gpu: bool) -> object:
    integers, floats = types.DALIDataType.INT32, types.DALIDataType.FLOAT
    files, start, shape, size, place, mirrored = fn.external_source(
        source,
        num_outputs=len(Run._fields),
        dtype=[types.DALIDataType.UINT8, integers, integers, floats, floats, integers],
        ndim=[1, 1, 1, 1, 1, 0],
        batch=True,
        no_copy=not on_gpu,  # a run's files are kept until its pictures are out, which a GPU's may be before it is done
    )
    window = fn.decoders.image_slice(
        files,
        start,
        shape,
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,  # boxes refer to pixels as stored
        jpeg_fancy_upsampling=True,  # as libjpeg does
    )
    resized = fn.resize(window, size=size, interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True)
    padding = [
        (round(255 * mean) - 255 * mean) / (255 * std) for mean, std in zip(settings.mean, settings.std, strict=True)
    ]
    return fn.crop_mirror_normalize(
        resized,
        crop=(settings.side, settings.side),
        crop_pos_y=place[0],
        crop_pos_x=place[1],
        out_of_bounds_policy="pad",
        fill_values=padding,
        mirror=mirrored,
        mean=[255 * mean for mean in settings.mean],
        std=[255 * std for std in settings.std],
        # DALI has no bf16; torch rounds to it from fp32
        dtype=types.DALIDataType.FLOAT16 if settings.dtype == torch.float16 else floats,
        output_layout="HWC" if settings.channels_last else "CHW",
    )


def take(pipeline: Pipeline, device: torch.device) -> Tensor:
    """The pictures of the oldest run, [n, 3, S, S] or [n, S, S, 3], in DALI's own memory.

    Raises:
        RuntimeError: a picture of the run cannot be decoded; the pipeline is then of no more use.
        StopIteration: there is no more run.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    (pictures,) = pipeline.outputs(cuda_stream=stream)
    return torch.from_dlpack(pictures.as_tensor())
