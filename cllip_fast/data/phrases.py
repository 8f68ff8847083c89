"""The words of the generated data set: attributes, phrases made of them, and combinations kept out of training."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

SIZES = ("small", "large")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring")
HELD_OUT_COUNT = 34


class Phrase(NamedTuple):
    """What one object is called; `str()` gives text such as "small red striped circle"."""

    size: str
    colour: str
    texture: str
    shape: str

    def __str__(self) -> str:
        return " ".join(self)

    @property
    def combination(self) -> tuple[str, str, str]:
        """Colour, texture and shape: what is held out together."""
        return self.colour, self.texture, self.shape


ALL_PHRASES = tuple(itertools.starmap(Phrase, itertools.product(SIZES, COLOURS, TEXTURES, SHAPES)))


def held_out_combinations(seed: int) -> frozenset[tuple[str, str, str]]:
    """The colour × texture × shape combinations that `train` and `val` never show.

    Every pair of two of the three (red with striped, striped with circle, ...) still occurs in training, so that an
    unseen object is a new combination of things that were each learned, and nothing else.
    """
    combinations = list(itertools.product(COLOURS, TEXTURES, SHAPES))
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(len(combinations))
        held_out = [combinations[i] for i in order[:HELD_OUT_COUNT]]
        if _pairs(combinations) == _pairs([combinations[i] for i in order[HELD_OUT_COUNT:]]):
            return frozenset(held_out)


def _pairs(combinations: list[tuple[str, str, str]]) -> set[tuple[int, str, str]]:
    """Every (left-out position, value, value) that occurs."""
    return {(k, *(c[:k] + c[k + 1 :])) for c in combinations for k in range(3)}
