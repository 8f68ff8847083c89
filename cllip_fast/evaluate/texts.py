"""Texts to features, each distinct text once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # texts encoded at a time


class Tokenizer(Protocol):
    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Token ids [n, length] int64 of n texts, padded with 0."""
        ...


class TextModel(Protocol):
    def encode_text(self, text: Tensor) -> Tensor: ...


class TextBook:
    """Numbers distinct texts in the order in which they first appear, and encodes them when features are asked for.

    Features are fp32, of unit length and on `device`, whatever type the model computes in. Texts count as equal when
    their characters are; the tokenizer may still make equal token rows of two texts, which then tie.
    """

    def __init__(self, model: TextModel, tokenizer: Tokenizer, length: int, device: torch.device) -> None:
        self.model, self.tokenizer, self.length, self.device = model, tokenizer, length, device
        self.numbers: dict[str, int] = {}
        self._encoded: list[Tensor] = []
        self._rows = 0

    def number(self, texts: Iterable[str]) -> Tensor:
        """The number of each text, [n] int64 on the CPU; texts not met before get the next ones."""
        return torch.tensor([self.numbers.setdefault(text, len(self.numbers)) for text in texts], dtype=torch.int64)

    @torch.no_grad()
    def features(self) -> Tensor:
        """[U, E]: the features of all texts numbered so far, in order; [0, 0] if there are none."""
        waiting = list(self.numbers)[self._rows :]
        for start in range(0, len(waiting), CHUNK):
            tokens = self.tokenizer(waiting[start : start + CHUNK], self.length).to(self.device)
            self._encoded.append(F.normalize(self.model.encode_text(tokens).float(), dim=-1))
        self._rows = len(self.numbers)
        if len(self._encoded) > 1:
            self._encoded = [torch.cat(self._encoded)]
        return self._encoded[0] if self._encoded else torch.empty(0, 0, device=self.device)
