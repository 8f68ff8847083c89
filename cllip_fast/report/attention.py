"""Where the Prompter looks: the attention of a box's and of a phrase's prompt over the patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.models import CllipModel

FINE = 16  # points a side of a patch, to measure boxes by


@dataclass(frozen=True)
class Look:
    """The attention of a prompt, the mean over its tokens (the two corners of a box, or the one of a phrase).

    Attributes:
        patches: [h, w], the share that each patch gets.
        own: share of the prompt's own tokens; that of a class token is what is left of 1.
    """

    patches: Tensor
    own: float

    def inside(self, boxes: Tensor) -> float:
        """Of what the patches get, the share in boxes [n, 4], xyxy in [0, 1]; a patch's is spread evenly over it.

        Attention that is the same everywhere so gives the share of the image that the boxes cover.
        """
        covered = F.avg_pool2d(_covered(boxes, self.patches.shape)[None], FINE)[0]
        return float((self.patches * covered).sum() / self.patches.sum())


def covered_share(boxes: Tensor) -> float:
    """The share of the image that boxes [n, 4] cover together."""
    return float(_covered(boxes, (FINE, FINE)).mean())


def _covered(boxes: Tensor, grid: Sequence[int]) -> Tensor:
    """Where `FINE` by `FINE` points a patch lie in any of boxes [n, 4]: [h·FINE, w·FINE] of 0 and 1."""
    y, x = ((torch.arange(length * FINE) + 0.5) / (length * FINE) for length in grid)
    x0, y0, x1, y1 = boxes.T[..., None]  # [n, 1] each
    rows, columns = (y >= y0) & (y <= y1), (x >= x0) & (x <= x1)
    return (rows[:, :, None] & columns[:, None]).any(0).float()


@torch.no_grad()
def look_at_boxes(model: CllipModel, image_tokens: Tensor, boxes: Tensor) -> list[Look]:
    """The prompts of boxes [K, 4] over one image's tokens [1, T, W]; the model has a Prompter."""
    return _look(model, image_tokens, model.prompter.box_prompts(boxes[None]))


@torch.no_grad()
def look_for_texts(model: CllipModel, image_tokens: Tensor, text_features: Tensor) -> list[Look]:
    """The prompts of text features [K, E] likewise."""
    return _look(model, image_tokens, model.prompter.text_prompts(text_features[None]))


def _look(model: CllipModel, image_tokens: Tensor, prompts: Tensor) -> list[Look]:
    memory = model.prompter.remember(image_tokens)
    shares = model.prompter.attention(memory, prompts)[0].float().mean(1).cpu()  # [K, n+T]
    count, patches = prompts.shape[2], model.config.patch_grid[0] * model.config.patch_grid[1]
    return [
        Look(share[-patches:].unflatten(0, model.config.patch_grid), float(share[:count].sum())) for share in shares
    ]
