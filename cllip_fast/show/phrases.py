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
from cllip_fast.show.canvas import FAINT, PALETTE, PAPER, cut, outline, paste, swatch, text_width, wrap, write
from cllip_fast.show.fonts import fit
from cllip_fast.show.heat import colour_bar, heat_panel

if TYPE_CHECKING:
    from cllip_fast.inference import Picture, TrainedModel

LONG_SIDE = 384  # of a panel, in pixels
COLUMNS = 3
GAP = 14
TEXT, SMALL = 15, 13  # font sizes
LINE = 20
TITLE_WIDTH = 240
PHRASE_LINES = 3  # of a title; a phrase that needs more is cut
BAR = (60, 10)  # the colours' scale


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `show` to the command line."""
    parser = commands.add_parser("show", help="find phrases in an image", description=_show.__doc__)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or another format that Pillow reads")
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="put -- before all if one begins with a hyphen")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run, or one checkpoint file")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="the picture to write (default: IMAGE_found.png in the present folder)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="file, or clip (default: the run's own)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> None:
    """Draw, for each phrase, its similarity to the patches of the image and the box that the model predicts."""
    from cllip_fast.inference import load

    out = _check_out(options.out or Path(f"{options.image.stem}_found.png"), options.image)
    model = load(options.checkpoint, device=options.device, tokenizer=options.tokenizer)
    path = phrase_picture(model, options.image, options.phrases, out)
    length = model.region_length
    for phrase, last in zip(options.phrases, model.tokenizer(options.phrases, length + 1)[:, -1], strict=True):
        if last:
            print(f"note: of {phrase!r} the model reads only the first {length} tokens", file=sys.stderr)
        if fit(phrase, TEXT)[1] != phrase:
            print(f"note: no font of this system has all of {phrase!r}: the picture spells the rest", file=sys.stderr)
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
        path: the file, of a format that Pillow writes by its suffix; missing folders are made.

    Returns:
        the path.

    Raises:
        InputError: an image or phrases that cannot be used, or a file that cannot be written, or is the image.
    """
    from cllip_fast.inference import read_picture

    path = _check_out(Path(path), image)
    data, whole = read_picture(image)
    shrink = LONG_SIDE / max(whole)
    size = (max(1, round(whole[0] * shrink)), max(1, round(whole[1] * shrink)))
    maps = model.similarity_map(image, phrases, size=size).cpu()
    boxes = model.ground(image, phrases).cpu() if model.grounds else [None] * len(maps)
    pixels = np.empty((size[1], size[0], 3), dtype=np.uint8)
    Decoder().fill(data, whole, Window((0, 0, *whole), (0, 0, *size)), np.zeros(3, np.uint8), pixels)
    picture = Image.fromarray(pixels)
    columns = min(1 + len(maps), COLUMNS)
    width = max(size[0], TITLE_WIDTH) + GAP
    titles = [wrap(phrase, width - GAP - 20, TEXT, PHRASE_LINES) for phrase in phrases]
    title_height = (max(map(len, titles)) + 2) * LINE + 4
    height = title_height + size[1] + GAP
    sheet = Image.new("RGB", (columns * width + GAP, -(-(1 + len(maps)) // columns) * height + GAP), PAPER)
    draw, scale = ImageDraw.Draw(sheet), torch.tensor([(size[0] - 1) / whole[0], (size[1] - 1) / whole[1]] * 2)
    marked = picture.copy()  # pasted last, when all boxes are on it
    for k, (title, similarity, box) in enumerate(zip(titles, maps, boxes, strict=True)):
        x, y = GAP + (k + 1) % columns * width, GAP + (k + 1) // columns * height
        colour = PALETTE[k % len(PALETTE)]
        seen = similarity[~similarity.isnan()]
        panel = heat_panel(picture, similarity.nan_to_num(float(seen.min())))
        below = y + title_height - 4 - 2 * LINE
        above = below - len(title) * LINE
        swatch(draw, (x, above + 2), colour)
        for line, text in enumerate(title):
            write(draw, (x + 20, above + line * LINE), text, TEXT)
        low = f"cosine {seen.min():z.2f}"
        write(draw, (x, below), low, SMALL, FAINT)
        bar = x + text_width(low, SMALL) + 6
        sheet.paste(colour_bar(*BAR), (bar, below + 4))
        write(draw, (bar + BAR[0] + 6, below), f"{seen.max():z.2f}", SMALL, FAINT)
        if box is not None:
            for drawn in (marked, panel):
                outline(ImageDraw.Draw(drawn), tuple((box * scale).tolist()), colour)
            where = "box " + " ".join(f"{value:.0f}" for value in box.tolist())
            write(draw, (x, below + LINE), where, SMALL, FAINT)
        paste(sheet, panel, (x, y + title_height))
    name = Path(image).name if isinstance(image, (str, Path)) else "image"
    about = "boxes as predicted" if model.grounds else "no boxes: not trained to ground"
    top = GAP + title_height - 4 - 3 * LINE
    write(draw, (GAP, top), cut(name, width - GAP, TEXT), TEXT)
    write(draw, (GAP, top + LINE), f"{whole[0]} by {whole[1]} pixels", SMALL, FAINT)
    write(draw, (GAP, top + 2 * LINE), about, SMALL, FAINT)
    paste(sheet, marked, (GAP, GAP + title_height))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: some formats' for a picture they cannot hold
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"picture {path} cannot be written: {reason}") from error
    return path


def _check_out(path: Path, image: Picture) -> Path:
    """The file to write, if it can be one."""
    known = Image.registered_extensions()
    if path.is_dir() or known.get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"out is {str(path)!r}, expected the name of a picture, such as found.png")
    if isinstance(image, (str, Path)) and path.exists() and Path(image).exists() and path.samefile(image):
        raise InputError(f"out is {str(path)!r}, expected another file than the image itself")
    return path
