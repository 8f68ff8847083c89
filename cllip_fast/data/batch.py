"""The one form in which data reaches a model: tensors of fixed shape, with masks for what varies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B images with one sampled text each and up to M regions each.

    Attributes:
        images: [B, 3, H, W] float32 (of a DALI loader the type asked for), normalised by the loader's mean and standard
            deviation.
        text: [B, L] int64 token ids of one caption an image; 0 is padding.
        boxes: [B, M, 4] float32, (x0, y0, x1, y1) as shares (0 to 1) of the width and height of `images`; padding is 0.
        region_text: [B, M, Lr] int64 token ids of the regions' texts; padded regions are all 0.
        region_mask: [B, M] bool, True for a real region; real regions come first.
        keys: the samples' keys, B of them.
        captions: all captions of each image, as text.
        phrases: the text of each real region, in the order of `boxes`.
    """

    images: Tensor
    text: Tensor
    boxes: Tensor
    region_text: Tensor
    region_mask: Tensor
    keys: list[str]
    captions: list[list[str]]
    phrases: list[list[str]]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a GPU can overlap with work."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        names = ("images", "text", "boxes", "region_text", "region_mask")
        return replace(self, **{name: function(getattr(self, name)) for name in names})
