"""Squares of bytes to what a model is given, the same for training, evaluation and `cllip_fast.load`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Normalise:
    """(pixel / 255 - mean) / std, as one multiplication and one addition: uint8 [n, S, S, 3] to float32 [n, 3, S, S].

    Attributes:
        padding: uint8 [3], the colour that becomes (nearly) 0.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std`: of red, green and blue, on a scale from 0 to 1."""
        self.padding = np.array([round(255 * value) for value in mean], dtype=np.uint8)
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)

    def __call__(self, squares: np.ndarray) -> Tensor:
        # Moving the channels while they are bytes takes half the time of moving them as floats.
        images = torch.from_numpy(np.ascontiguousarray(squares.transpose(0, 3, 1, 2))).to(torch.float32)
        return images.mul_(self._scale).add_(self._shift)
