"""What the model sees of a sample in one pass: window, mirroring, caption, regions. Pixels are left to a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cllip_fast.data.crop import Box, Window, choose_flip, choose_window, map_box, mirror_box, sample_rng
from cllip_fast.data.record import Record


class View(NamedTuple):
    """One sample as one batch shows it.

    Attributes:
        window: which part of the stored image goes where in the square.
        mirrored: whether the square is then mirrored left to right; `boxes` are as after that.
        caption: the text of the image.
        boxes: x0, y0, x1, y1 as shares (0 to 1) of the square.
        phrases: the boxes' texts.
    """

    window: Window
    mirrored: bool
    caption: str
    boxes: list[Box]
    phrases: list[str]


@dataclass(frozen=True)
class Viewer:
    """Chooses views, each a function of record, key, epoch and these settings (as in `create_loader`) alone."""

    image_size: int
    max_regions: int
    train: bool
    seed: int
    crop: str
    min_kept_area: float
    flip: float = 0.0

    def view(self, record: Record, key: str, epoch: int) -> View:
        """The view of a sample in the pass `epoch`: one caption and at most M of the regions that the window keeps.

        Texts and regions are drawn in training; in evaluation they are the first ones.
        """
        draw = {"seed": self.seed, "epoch": epoch, "key": key}
        window = choose_window(self.crop, record.width, record.height, self.image_size, **draw)
        boxes = [map_box(box, window, self.image_size, self.min_kept_area) for box in record.boxes]
        regions = [(box, text) for box, text in zip(boxes, record.phrases, strict=True) if box is not None]
        if not self.train:
            return _view(window, False, record.captions[0], regions[: self.max_regions])
        rng = sample_rng(**draw, purpose="texts")
        caption = record.captions[rng.randrange(len(record.captions))]
        chosen = rng.sample(regions, min(len(regions), self.max_regions))
        mirrored = choose_flip(self.flip, [*record.captions, *record.phrases], **draw)
        if mirrored:
            chosen = [(mirror_box(box), text) for box, text in chosen]
        return _view(window, mirrored, caption, chosen)


def _view(window: Window, mirrored: bool, caption: str, regions: list[tuple[Box, str]]) -> View:
    return View(window, mirrored, caption, [box for box, _ in regions], [text for _, text in regions])
