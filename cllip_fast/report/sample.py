"""The first samples of a split, looked at once more: pictures, features and predicted boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cllip_fast.data import Batch
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD
from cllip_fast.errors import InputError
from cllip_fast.evaluate.features import unit
from cllip_fast.evaluate.texts import TextBook
from cllip_fast.inference import TrainedModel
from cllip_fast.show.sheet import to_pictures


@dataclass
class Sample:
    """N images of a split, their R regions, and the Q phrases asked of them; features fp32, unit length, on the CPU.

    Attributes:
        keys, pictures: N; the pictures as the model sees them, enlarged.
        caption_image: [C] int64, the images that have a caption; each image's first counts.
        captions: C texts.
        image_features: [N, E].
        caption_features: [C, E].
        region_image, region_phrase: [R] int64, image and phrase of each region.
        boxes: [R, 4], xyxy in [0, 1].
        region_features: [R, E].
        phrases, phrase_features: U distinct texts and [U, E].
        asked: [Q, 2] int64, image and phrase; a phrase that occurs several times in an image is asked once.
        predicted: [Q, 4], the box predicted for each; None for a model that cannot ground.
    """

    keys: list[str]
    pictures: list[Image.Image]
    captions: list[str]
    caption_image: Tensor
    image_features: Tensor
    caption_features: Tensor
    region_image: Tensor
    region_phrase: Tensor
    boxes: Tensor
    region_features: Tensor
    phrases: list[str]
    phrase_features: Tensor
    asked: Tensor
    predicted: Tensor | None

    def boxes_of(self, image: int, phrase: int) -> Tensor:
        """The true boxes [n, 4] of a phrase in an image."""
        return self.boxes[(self.region_image == image) & (self.region_phrase == phrase)]


def first_batches(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Batches of the first `count` images in all."""
    for batch in batches:
        kept = Batch(*(getattr(batch, each.name)[:count] for each in fields(batch)))
        yield kept
        count -= len(kept)
        if count <= 0:
            return


@dataclass
class _Kept:
    """Per-batch parts of a `Sample` before they are joined."""

    image_features: list[Tensor] = field(default_factory=list)
    region_image: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    region_features: list[Tensor] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)


def take_sample(model: TrainedModel, batches: Iterable[Batch], *, total: int, name: str) -> Sample:
    """Look at all images of `batches`.

    Args:
        total: how many there will be, for the progress bar.
        name: of the split, likewise.

    Raises:
        InputError: there are none.
    """
    clip, parts = model.model, _Kept()
    keys, pictures, captions, caption_image, phrase_numbers = [], [], [], [], []
    with model.computing(), tqdm(total=total, desc=f"report {name}", unit="image", leave=False, disable=None) as bar:
        phrases = TextBook(clip, model.tokenizer, model.region_length, model.device)
        for batch in batches:
            first = len(keys)
            keys += batch.keys
            pictures += to_pictures(batch.images, CLIP_MEAN, CLIP_STD)
            for i, texts in enumerate(batch.captions, first):
                captions += texts[:1]
                caption_image += [i] * len(texts[:1])
            numbers = phrases.number(text for texts in batch.phrases for text in texts)
            mask, boxes = batch.region_mask, batch.boxes
            image = mask.nonzero()[:, 0]
            tokens = clip.image_tokens(batch.images.to(model.device))
            parts.image_features.append(unit(clip.pool_image(tokens)).cpu())
            parts.boxes.append(boxes[mask].float())
            parts.region_image.append(first + image)
            phrase_numbers.append(numbers)
            regions = unit(clip.encode_regions(tokens, boxes.to(model.device))).cpu()
            parts.region_features.append(regions[mask])
            asked = torch.stack([image, numbers], 1).unique(dim=0)
            parts.asked.append(asked + torch.tensor([first, 0]))
            if clip.prompter is not None and len(asked):
                parts.predicted.append(_ground(model, tokens, asked, phrases.features()))
            bar.update(len(batch.keys))
        texts = phrases.features().cpu()
    if not keys:
        raise InputError(f"split {name}: none of its samples can be used")
    return Sample(
        keys=keys,
        pictures=pictures,
        captions=captions,
        caption_image=torch.tensor(caption_image, dtype=torch.int64),
        caption_features=model.encode_text(captions).cpu() if captions else torch.empty(0, 0),
        region_phrase=torch.cat(phrase_numbers),
        phrases=list(phrases.numbers),
        phrase_features=texts,
        image_features=torch.cat(parts.image_features),
        region_image=torch.cat(parts.region_image),
        boxes=torch.cat(parts.boxes),
        region_features=torch.cat(parts.region_features),
        asked=torch.cat(parts.asked),
        predicted=torch.cat(parts.predicted or [torch.empty(0, 4)]) if clip.prompter is not None else None,
    )


def _ground(model: TrainedModel, tokens: Tensor, asked: Tensor, texts: Tensor) -> Tensor:
    """The box [q, 4] of each pair of an image of this batch and a phrase."""
    boxes = torch.empty(len(asked), 4)
    for image in asked[:, 0].unique().tolist():
        own = asked[:, 0] == image
        wanted = texts[asked[own, 1].to(model.device)]
        boxes[own] = model.model.ground(tokens[image : image + 1], wanted[None])[0].float().cpu()
    return boxes
