"""Checks of what the model's verbs are given."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.models.config import ModelConfig

BOX_SLACK = 1e-4  # rounding of boxes that touch the image's edge


def check_image_tokens(image_tokens: Tensor, config: ModelConfig) -> None:
    """Raise `InputError` unless they are tokens of this model, [B, T, W]."""
    rows, columns = config.patch_grid
    length = rows * columns + int(config.class_token)
    check_tensor("image_tokens", image_tokens, ("B", length, config.vision_width), floating=True)


def check_boxes(boxes: Tensor, images: Tensor) -> None:
    """Raise `InputError` unless they are [B, M, 4], for as many images, and (on a CPU) lie in [0, 1]."""
    check_tensor("boxes", boxes, (len(images), "M", 4), floating=True, like=("the image", images))
    if values_at_hand(boxes) and not bool(((boxes >= -BOX_SLACK) & (boxes <= 1 + BOX_SLACK)).all()):
        low, high = boxes.aminmax()
        raise InputError(f"boxes run from {low:g} to {high:g}, expected xyxy as shares of the image, in [0, 1]")


def check_text(name: str, text: Tensor, shape: tuple[int | str, ...], config: ModelConfig, like: Tensor) -> None:
    """Raise `InputError` unless it is int64 of that shape, short enough, and (on a CPU) within the vocabulary."""
    check_tensor(name, text, shape, dtype=torch.int64, like=("the model", like))
    length = text.shape[-1]
    if not 1 <= length <= config.text_length:
        raise InputError(f"{name} has {length} tokens a text, expected 1 to {config.text_length}")
    if values_at_hand(text):
        low, high = text.aminmax()
        if low < 0 or high >= config.vocab_size:
            wrong = int(low if low < 0 else high)
            raise InputError(f"{name} holds token {wrong}, expected ids from 0 to {config.vocab_size - 1}")


def values_at_hand(x: Tensor) -> bool:
    """Whether looking at values costs nothing: not on a GPU, where it waits for the queue, nor while compiling."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()
