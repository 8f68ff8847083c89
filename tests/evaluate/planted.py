"""A model whose answers are planted, and splits for it: the metrics' values can then be known beforehand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cllip_fast.data.batch import Batch

GRID = (2, 3)


class NumberTokenizer:
    """Gives each text a number of its own, from 1, as its only token."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.lengths: dict[str, int] = {}

    def __call__(self, texts: list[str], length: int) -> Tensor:
        rows = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            row[0] = self.numbers.setdefault(text, len(self.numbers) + 1)
            self.lengths[text] = length
        return rows


class PlantedModel(nn.Module):
    """Has the verbs of `CllipModel`; images carry their number in their first pixel.

    Tables by image number: `images` [N, E], `patches` [N, P, E], `regions` [N, M, E]; by text: `texts` text -> [E];
    by (image number, text): `boxes` -> [4]. Features are not of unit length: evaluation has to normalise.
    """

    def __init__(self, tokenizer: NumberTokenizer, *, images: Tensor, patches: Tensor, regions: Tensor,
                 texts: dict[str, Tensor], boxes: dict[tuple[int, str], list[float]] | None) -> None:  # fmt: skip
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(patch_grid=GRID)
        self.prompter = None if boxes is None else object()
        self.tokenizer, self.images, self.patches, self.regions = tokenizer, images, patches, regions
        self.texts, self.boxes = texts, boxes
        self.images_encoded = 0
        self.modes: set[bool] = set()

    def image_tokens(self, images: Tensor) -> Tensor:
        self.images_encoded += len(images)
        self.modes.add(self.training)
        return images[:, 0, 0, 0].long()

    def pool_image(self, image_tokens: Tensor) -> Tensor:
        return 3 * self.images[image_tokens]

    def encode_patches(self, image_tokens: Tensor) -> Tensor:
        return 5 * self.patches[image_tokens]

    def encode_regions(self, image_tokens: Tensor, boxes: Tensor) -> Tensor:
        return 2 * self.regions[image_tokens, : boxes.shape[1]]

    def encode_text(self, text: Tensor) -> Tensor:
        names = {number: name for name, number in self.tokenizer.numbers.items()}
        return torch.stack([7 * self.texts[names[int(row[0])]] for row in text])

    def ground(self, image_tokens: Tensor, text_features: Tensor) -> Tensor:
        """The planted box of the text whose feature it is; padded places get a box of nothing."""
        names, table = list(self.texts), torch.stack(list(self.texts.values()))
        table = table / table.norm(dim=1, keepdim=True)
        boxes = torch.zeros(*text_features.shape[:2], 4)
        for i, image in enumerate(image_tokens.tolist()):
            for k, feature in enumerate(text_features[i]):
                if feature.norm() > 0:
                    boxes[i, k] = torch.tensor(self.boxes[image, names[int((table @ feature).argmax())]])
        return boxes


def make_batches(
    captions: list[list[str]], phrases: list[list[str]], boxes: list[list[list[float]]], sizes: list[int]
) -> list[Batch]:
    """Batches of the given sizes; each is padded to its own largest number of regions, plus one."""
    batches, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        places = 1 + max(len(texts) for texts in phrases[part])
        padded, mask = torch.zeros(size, places, 4), torch.zeros(size, places, dtype=torch.bool)
        for i, given in enumerate(boxes[part]):
            if given:
                padded[i, : len(given)] = torch.tensor(given)
                mask[i, : len(given)] = True
        images = torch.arange(first, first + size).float()[:, None, None, None].expand(-1, 3, 2, 2)
        batches.append(
            Batch(
                images=images,
                text=torch.ones(size, 4, dtype=torch.int64),
                boxes=padded,
                region_text=torch.zeros(size, places, 4, dtype=torch.int64),
                region_mask=mask,
                keys=[str(first + i) for i in range(size)],
                captions=captions[part],
                phrases=phrases[part],
            )
        )
        first += size
    return batches
