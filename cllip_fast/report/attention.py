"""Where the Prompter looks: the attention of a box's and of a phrase's prompt over the patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.models import CllipModel


@dataclass(frozen=True)
class Look:
    """The attention of a prompt, the mean over its tokens (the two corners of a box, or the one of a phrase).

    Attributes:
        patches: [h, w], the share that each patch gets.
        own: share of the prompt's own tokens; that of a class token is what is left of 1.
    """

    patches: Tensor
    own: float

    def inside(self, box: Tensor) -> float:
        """Of what the patches get, the share of those whose centre lies in a box [4], xyxy in [0, 1]."""
        rows, columns = self.patches.shape
        y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
        x0, y0, x1, y1 = box.tolist()
        inside = ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))
        return float(self.patches[inside].sum() / self.patches.sum())


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
