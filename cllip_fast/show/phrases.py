"""`cllip-fast show`: where a trained model finds phrases in one image, as a picture."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from cllip_fast.errors import InputError
from cllip_fast.show.canvas import FAINT, PALETTE, PAPER, cut, outline, paste, swatch, write
from cllip_fast.show.heat import heat_panel

if TYPE_CHECKING:
    from cllip_fast.inference import Picture, TrainedModel

LONG_SIDE = 384  # of a panel, in pixels
COLUMNS = 3
GAP = 14
TEXT, SMALL = 15, 13  # font sizes
LINE = 20
TITLE_WIDTH, TITLE_HEIGHT = 240, 2 * LINE + 4


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `show` to the command line."""
    parser = commands.add_parser("show", help="find phrases in an image", description=_show.__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("phrases", nargs="+", metavar="PHRASE")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run, or one checkpoint file")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--tokenizer", metavar="NAME", help="file, or clip (default: the run's own)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> None:
    """Draw, for each phrase, its similarity to the patches of the image and the box that the model predicts."""
    from cllip_fast.inference import load

    model = load(options.checkpoint, device=options.device, tokenizer=options.tokenizer)
    print(phrase_picture(model, options.image, options.phrases, options.out))


def phrase_picture(model: TrainedModel, image: Picture, phrases: Sequence[str], path: str | Path) -> Path:
    """Write a picture with one panel a phrase: the cosine with each patch over the image, its peak marked, and the box.

    The title holds the phrase, the highest cosine in the image and the box in pixels (x0 y0 x1 y1). Colours run from
    the lowest to the highest cosine of the panel; what the model does not see of it (crop "center") has the lowest.

    Args:
        model: from `cllip_fast.load`; of one that cannot ground, the boxes are left out and the title says so.
        image: as for `TrainedModel`.
        phrases: at least one.
        path: the file; missing folders are made.

    Returns:
        the path.

    Raises:
        InputError: an image that cannot be read, no phrases, or a file that cannot be written.
    """
    from cllip_fast.inference import read_picture

    path = Path(path)
    data, whole = read_picture(image)
    shrink = LONG_SIDE / max(whole)
    size = (max(1, round(whole[0] * shrink)), max(1, round(whole[1] * shrink)))
    maps = model.similarity_map(image, phrases, size=size).cpu()
    boxes = model.ground(image, phrases).cpu() if model.model.prompter is not None else [None] * len(maps)
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    columns = min(len(maps), COLUMNS)
    width, height = max(size[0], TITLE_WIDTH) + GAP, TITLE_HEIGHT + size[1] + GAP
    sheet = Image.new("RGB", (columns * width + GAP, -(-len(maps) // columns) * height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, (phrase, similarity, box) in enumerate(zip(phrases, maps, boxes, strict=True)):
        x, y = GAP + k % columns * width, GAP + k // columns * height
        colour = PALETTE[k % len(PALETTE)]
        seen = similarity[~similarity.isnan()]
        panel = heat_panel(picture, similarity.nan_to_num(float(seen.min())))
        where = "no box: it cannot ground"
        if box is not None:
            scale = torch.tensor([(size[0] - 1) / whole[0], (size[1] - 1) / whole[1]] * 2)
            outline(ImageDraw.Draw(panel), tuple((box * scale).tolist()), colour)
            where = "box " + " ".join(f"{value:.0f}" for value in box.tolist())
        swatch(draw, (x, y + 2), colour)
        write(draw, (x + 20, y), cut(phrase, width - GAP - 20, TEXT), TEXT)
        write(draw, (x, y + LINE), cut(f"cosine {seen.max():.2f}, {where}", width - GAP, SMALL), SMALL, FAINT)
        paste(sheet, panel, (x, y + TITLE_HEIGHT))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: Pillow's for a suffix that names no format
        raise InputError(f"picture {path} cannot be written: {error}") from error
    return path
