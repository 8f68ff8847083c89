"""OpenCLIP's WebDataset pipeline as its code does it (`open_clip_train/data.py`, `open_clip/transform.py`).

Neither webdataset nor torchvision need be installed: this is their form in tarfile, Pillow and PyTorch, stage by stage:
tars read from end to end, Pillow decodes to RGB ("pilrgb"), the window is cropped and resized by Pillow's bicubic
filter, ToTensor, Normalize, one call of the tokenizer for each text. Left out: shuffle buffers, which cost it extra.
The windows and the tokenizer are ours, so that both do the same work.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cllip_fast.data.crop import Window, choose_window
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD

Clock = Callable[[str], None]  # called at the end of each stage, with its name


def ignore(stage: str) -> None:
    pass


def full_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image.convert("RGB")


def cropped(image: Image.Image, window: Window, side: int) -> Image.Image:
    """RandomResizedCrop of a PIL image: crop, then resize."""
    return image.crop(window.source).resize((side, side), Image.Resampling.BICUBIC)


class WebDatasetPipeline(IterableDataset):
    """Batches (images [B, 3, S, S], text [B, L]); a worker reads every n-th shard."""

    def __init__(
        self, shards: list[Path], tokenizer: Callable[..., Tensor], batch_size: int, side: int, length: int
    ) -> None:
        self._shards, self._tokenizer, self._batch_size = shards, tokenizer, batch_size
        self._side, self._length = side, length
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        self.clock: Clock = ignore

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        mine = self._shards[worker.id :: worker.num_workers] if worker else self._shards
        batch = []
        for key, data, caption in self._samples(mine):
            image = full_pillow(data)
            self.clock("decode")
            window = choose_window("random", *image.size, self._side, seed=0, epoch=0, key=key)
            image = cropped(image, window, self._side)
            self.clock("crop and resize")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
            pixels = pixels.clone().sub_(self._mean).div_(self._std)
            self.clock("normalise")
            text = self._tokenizer([caption], self._length)[0]
            self.clock("tokenise")
            batch.append((pixels, text))
            if len(batch) == self._batch_size:
                images, texts = (torch.stack(each) for each in zip(*batch, strict=True))
                self.clock("other")
                yield images, texts
                batch = []

    def _samples(self, shards: list[Path]) -> Iterator[tuple[str, bytes, str]]:
        for shard in shards:
            with open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                files: dict[str, bytes] = {}
                for member in tar:
                    tar.members.clear()
                    key, _, suffix = member.name.partition(".")
                    files[suffix] = tar.extractfile(member).read()
                    if len(files) == 2:
                        caption = json.loads(files["json"])["captions"][0]  # in its shards a file key.txt
                        self.clock("read")
                        yield key, files["jpg"], caption
                        files = {}
