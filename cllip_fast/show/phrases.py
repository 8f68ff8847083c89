"""`cllip-fast show`: where a trained model finds phrases in one image, as a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from cllip_fast.data.crop import Window
from cllip_fast.data.decode import Decoder
from cllip_fast.errors import InputError
from cllip_fast.show.canvas import FAINT, PALETTE, PAPER, cut, outline, paste, swatch, text_width, write
from cllip_fast.show.heat import colour_bar, heat_panel

if TYPE_CHECKING:
    from cllip_fast.inference import Picture, TrainedModel

LONG_SIDE = 384  # of a panel, in pixels
COLUMNS = 3
GAP = 14
TEXT, SMALL = 15, 13  # font sizes
LINE = 20
TITLE_WIDTH, TITLE_HEIGHT = 240, 3 * LINE + 4
BAR = (60, 10)  # the colours' scale


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `show` to the command line."""
    parser = commands.add_parser("show", help="find phrases in an image", description=_show.__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="put -- before all if one begins with a hyphen")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run, or one checkpoint file")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--tokenizer", metavar="NAME", help="file, or clip (default: the run's own)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> None:
    """Draw, for each phrase, its similarity to the patches of the image and the box that the model predicts."""
    from cllip_fast.inference import load

    model = load(options.checkpoint, device=options.device, tokenizer=options.tokenizer)
    path = phrase_picture(model, options.image, options.phrases, options.out)
    length = model.region_length
    for phrase, last in zip(options.phrases, model.tokenizer(options.phrases, length + 1)[:, -1], strict=True):
        if last:
            print(f"note: of {phrase!r} the model reads only the first {length} tokens", file=sys.stderr)
    print(path)


def phrase_picture(model: TrainedModel, image: Picture, phrases: Sequence[str], path: str | Path) -> Path:
    """Write a picture: the image with the predicted boxes, then a panel a phrase with its cosine to each patch.

    A panel's title holds the phrase, the lowest and the highest cosine in the image between the colours that stand for
    them, and the box in pixels (x0 y0 x1 y1); a ring marks the highest. What the model does not see of the image (crop
    "center") has the colour of the lowest.

    Args:
        model: from `cllip_fast.load`; of one that cannot ground, the boxes are left out and the title says so.
        image: as for `TrainedModel`.
        phrases: at least one.
        path: the file; missing folders are made.

    Returns:
        the path.

    Raises:
        InputError: an image or phrases that cannot be used, or a file that cannot be written.
    """
    from cllip_fast.inference import read_picture

    path = Path(path)
    data, whole = read_picture(image)
    shrink = LONG_SIDE / max(whole)
    size = (max(1, round(whole[0] * shrink)), max(1, round(whole[1] * shrink)))
    maps = model.similarity_map(image, phrases, size=size).cpu()
    boxes = model.ground(image, phrases).cpu() if model.grounds else [None] * len(maps)
    pixels = np.empty((size[1], size[0], 3), dtype=np.uint8)
    Decoder().fill(data, whole, Window((0, 0, *whole), (0, 0, *size)), np.zeros(3, np.uint8), pixels)
    picture = Image.fromarray(pixels)
    columns = min(1 + len(maps), COLUMNS)
    width, height = max(size[0], TITLE_WIDTH) + GAP, TITLE_HEIGHT + size[1] + GAP
    sheet = Image.new("RGB", (columns * width + GAP, -(-(1 + len(maps)) // columns) * height + GAP), PAPER)
    draw, scale = ImageDraw.Draw(sheet), torch.tensor([(size[0] - 1) / whole[0], (size[1] - 1) / whole[1]] * 2)
    marked = picture.copy()  # pasted last, when all boxes are on it
    for k, (phrase, similarity, box) in enumerate(zip(phrases, maps, boxes, strict=True)):
        x, y = GAP + (k + 1) % columns * width, GAP + (k + 1) // columns * height
        colour = PALETTE[k % len(PALETTE)]
        seen = similarity[~similarity.isnan()]
        panel = heat_panel(picture, similarity.nan_to_num(float(seen.min())))
        swatch(draw, (x, y + 2), colour)
        write(draw, (x + 20, y), cut(phrase, width - GAP - 20, TEXT), TEXT)
        low = f"cosine {seen.min():.2f}"
        write(draw, (x, y + LINE), low, SMALL, FAINT)
        bar = x + text_width(low, SMALL) + 6
        sheet.paste(colour_bar(*BAR), (bar, y + LINE + 4))
        write(draw, (bar + BAR[0] + 6, y + LINE), f"{seen.max():.2f}", SMALL, FAINT)
        if box is not None:
            for drawn in (marked, panel):
                outline(ImageDraw.Draw(drawn), tuple((box * scale).tolist()), colour)
            where = "box " + " ".join(f"{value:.0f}" for value in box.tolist())
            write(draw, (x, y + 2 * LINE), where, SMALL, FAINT)
        paste(sheet, panel, (x, y + TITLE_HEIGHT))
    name = Path(image).name if isinstance(image, (str, Path)) else "image"
    write(draw, (GAP, GAP), cut(name, width - GAP, TEXT), TEXT)
    write(draw, (GAP, GAP + LINE), f"{whole[0]} by {whole[1]} pixels", SMALL, FAINT)
    about = "boxes as predicted" if model.grounds else "no boxes: not trained to ground"
    write(draw, (GAP, GAP + 2 * LINE), about, SMALL, FAINT)
    paste(sheet, marked, (GAP, GAP + TITLE_HEIGHT))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: Pillow's for a suffix that names no format
        raise InputError(f"picture {path} cannot be written: {error}") from error
    return path
