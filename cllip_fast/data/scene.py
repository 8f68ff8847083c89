"""One generated scene: which objects, where, how they are drawn, and the captions that are true of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cllip_fast.data import drawing
from cllip_fast.data.phrases import COLOURS, SHAPES, SIZES, TEXTURES, Phrase

MIN_VISIBLE = 0.8  # share of each object's own pixels that no later object covers
CAPTION_COUNT = 2
MAX_NAMED = 5  # objects that a caption has room for
_PLACES_TRIED = 24
_MAX_BOX_OVERLAP = 0.25  # of the smaller box: a cheap test before the exact one on pixels
_VALUES = (SIZES, COLOURS, TEXTURES, SHAPES)


@dataclass(frozen=True)
class Difficulty:
    """How hard scenes are to read.

    Attributes:
        objects: fewest and most in a scene.
        small, large: shortest and longest side of an object in pixels.
        distractor_share: of the objects after the first that differ from an earlier one in a single attribute.
        named: objects that a caption names at most, no more than `MAX_NAMED`.
        colour_shift: largest change of an object's red, green and blue, each by itself.
    """

    objects: tuple[int, int]
    small: tuple[int, int]
    large: tuple[int, int]
    distractor_share: float
    named: int
    colour_shift: int

    def sides(self, size: str) -> tuple[int, int]:
        """Shortest and longest side of an object of this size, in pixels."""
        return {"small": self.small, "large": self.large}[size]


DIFFICULTIES = {
    "normal": Difficulty((2, 5), (15, 20), (24, 31), distractor_share=0.3, named=5, colour_shift=18),
    # More objects than a caption names, colours that vary more, and sizes that overlap: one of 16 to 18 pixels may be
    # called either, so that nobody is right about more than 95.5 % of them.
    "hard": Difficulty((3, 6), (14, 18), (16, 25), distractor_share=0.3, named=4, colour_shift=36),
}


@dataclass(frozen=True)
class SceneObject:
    """A drawn object: its mask (bool, tight) has its top left corner at pixel (left, top)."""

    phrase: Phrase
    left: int
    top: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box of the whole object, hidden pixels included: x0, y0, x1, y1 in pixels, the far ends excluded."""
        return self.left, self.top, self.left + self.mask.shape[1], self.top + self.mask.shape[0]

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, x and y in pixels."""
        return self.left + self.mask.shape[1] / 2, self.top + self.mask.shape[0] / 2


def lay_out(rng: np.random.Generator, phrases: Sequence[Phrase], difficulty: Difficulty) -> list[SceneObject]:
    """Objects with distinct phrases out of `phrases`, in drawing order, each at least `MIN_VISIBLE` visible."""
    allowed = frozenset(phrases)
    while True:
        wanted = int(rng.integers(difficulty.objects[0], difficulty.objects[1] + 1))
        objects: list[SceneObject] = []
        for _ in range(2 * wanted):  # a phrase that finds no room makes way for another
            if len(objects) == wanted:
                break
            share = difficulty.distractor_share
            phrase = _choose_phrase(rng, phrases, allowed, [o.phrase for o in objects], share)
            placed = _place(rng, phrase, objects, difficulty.sides(phrase.size))
            if placed is not None:
                objects.append(placed)
        if len(objects) >= difficulty.objects[0] and min(visible_shares(objects)) >= MIN_VISIBLE:
            return objects


def visible_shares(objects: Sequence[SceneObject]) -> list[float]:
    """Share of each object's pixels that stay visible when all are drawn in order."""
    owner = np.full((drawing.IMAGE_SIZE, drawing.IMAGE_SIZE), -1, dtype=np.int8)
    for number, item in enumerate(objects):
        x0, y0, x1, y1 = item.box
        owner[y0:y1, x0:x1][item.mask] = number
    seen = np.bincount(owner.ravel() + 1, minlength=len(objects) + 1)[1:]
    return [int(count) / int(item.mask.sum()) for count, item in zip(seen, objects, strict=True)]


def draw(rng: np.random.Generator, objects: Sequence[SceneObject], difficulty: Difficulty) -> np.ndarray:
    """Picture of `objects` over a random background, uint8 [64, 64, 3]."""
    image = drawing.background(rng)
    shift = difficulty.colour_shift
    for item in objects:
        variant, shift_y, shift_x = rng.integers(0, 12, size=3).tolist()
        second = drawing.texture_pattern(item.phrase.texture, variant, (shift_y, shift_x), item.mask.shape)
        first_rgb = np.asarray(drawing.COLOUR_RGB[item.phrase.colour]) + rng.integers(-shift, shift + 1, size=3)
        rgb = np.stack([first_rgb, first_rgb * rng.uniform(0.3, 0.5)]).astype(np.int16)
        drawing.paint(image, item.left, item.top, item.mask, second, rgb)
    return drawing.add_pixel_noise(image, rng)


def captions(rng: np.random.Generator, objects: Sequence[SceneObject], named: int) -> list[str]:
    """At most `CAPTION_COUNT` different texts of at most 30 words: objects, `named` at most, and how some of them lie.

    Their forms, with A to E for "a <phrase>" and ~ for a relation that is true of the box centres: "A ~ B",
    "A ~ B with C (and D (and E))", "A ~ B and ~ C" (both said of A), "A ~ B and C ~ D".
    """
    return list(dict.fromkeys(_caption(rng, objects, named) for _ in range(CAPTION_COUNT)))


def relation(first: SceneObject, second: SceneObject) -> str:
    """How `first` lies to `second`, along the axis on which their centres are further apart."""
    right, down = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    if abs(right) >= abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def _caption(rng: np.random.Generator, objects: Sequence[SceneObject], named: int) -> str:
    chosen = [objects[i] for i in rng.permutation(len(objects))[:named]]
    names = [f"a {item.phrase}" for item in chosen]
    text = f"{names[0]} {relation(chosen[0], chosen[1])} {names[1]}"
    if len(chosen) == 2:
        return text
    if len(chosen) == MAX_NAMED or rng.random() < 0.5:
        return f"{text} with {' and '.join(names[2:])}"
    if len(chosen) == 3:
        return f"{text} and {relation(chosen[0], chosen[2])} {names[2]}"
    return f"{text} and {names[2]} {relation(chosen[2], chosen[3])} {names[3]}"


def _choose_phrase(
    rng: np.random.Generator,
    phrases: Sequence[Phrase],
    allowed: frozenset[Phrase],
    present: list[Phrase],
    distractor_share: float,
) -> Phrase:
    """A phrase that is not in the scene yet, often one attribute away from one that is."""
    if present and rng.random() < distractor_share:
        base = present[int(rng.integers(len(present)))]
        which = int(rng.integers(len(_VALUES)))
        others = [value for value in _VALUES[which] if value != base[which]]
        value = others[int(rng.integers(len(others)))]
        near = Phrase(*base[:which], value, *base[which + 1 :])
        if near in allowed and near not in present:
            return near
    while True:
        phrase = phrases[int(rng.integers(len(phrases)))]
        if phrase not in present:
            return phrase


def _place(
    rng: np.random.Generator, phrase: Phrase, objects: Sequence[SceneObject], sides: tuple[int, int]
) -> SceneObject | None:
    """The object at a random place where it hides little of the others, or None where no such place was found."""
    low, high = sides
    width, height = int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))
    mask = drawing.shape_mask(phrase.shape, width, height)
    for across, down in rng.random((_PLACES_TRIED, 2)).tolist():
        left = int(across * (drawing.IMAGE_SIZE - width + 1))
        top = int(down * (drawing.IMAGE_SIZE - height + 1))
        if all(_box_overlap((left, top, left + width, top + height), item.box) <= _MAX_BOX_OVERLAP for item in objects):
            return SceneObject(phrase, left, top, mask)
    return None


def _box_overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Area that two boxes share, as a share of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0) * max(height, 0) / smaller
