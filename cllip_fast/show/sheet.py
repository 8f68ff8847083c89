"""The picture sheet: images, true and predicted boxes, and where each phrase finds itself in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cllip_fast.data.batch import Batch
from cllip_fast.errors import InputError
from cllip_fast.evaluate.features import unit
from cllip_fast.evaluate.texts import Tokenizer
from cllip_fast.losses.boxes import box_iou
from cllip_fast.models.cllip import CllipModel
from cllip_fast.show.canvas import FAINT, PALETTE, PAPER, Colour, cut, outline, paste, swatch, text_width, wrap, write
from cllip_fast.show.heat import colour_bar, heat_panel, mark_peak

MAPS = 4  # similarity maps an image
GAP = 12
LEGEND_WIDTH = 290
TEXT, SMALL = 15, 13  # font sizes
LINE = 20
HEADER_HEIGHT = 84


@dataclass
class Answer:
    """What the model says about one phrase of an image; a phrase that occurs several times is asked once.

    Attributes:
        phrase: the text.
        boxes: [n, 4] the true boxes of the phrase, xyxy in [0, 1].
        similarity: [h, w] cosine of the phrase with each patch.
        predicted: [4], the box predicted from the phrase; None for a model that cannot ground.
        iou: of the prediction with the best of the true boxes; None likewise.
    """

    phrase: str
    boxes: Tensor
    similarity: Tensor
    predicted: Tensor | None
    iou: float | None


@torch.no_grad()
def picture_sheet(
    model: CllipModel,
    batch: Batch,
    *,
    tokenizer: Tokenizer,
    region_length: int,
    mean: Sequence[float],
    std: Sequence[float],
    path: str | Path,
    count: int = 12,
) -> Path:
    """Write a PNG with one row for each of the first `count` images of a batch.

    A row shows the image with the true boxes (solid) and the boxes predicted from the phrases (dashed; left out when
    the model cannot ground), the phrases with the IoU of their prediction, and for the first four phrases the cosine
    with each patch over the image, its peak marked. A phrase that occurs several times in an image is asked once; its
    boxes share a colour, and their number stands in brackets behind it.

    Args:
        model: in evaluation mode.
        tokenizer, region_length: for the phrases.
        mean, std: three each; the loader's normalisation, undone for display.
        path: the file; missing folders are made.

    Returns:
        the path.

    Raises:
        InputError: an empty batch, `count` < 1, or mean and std that are not three numbers.
    """
    if len(batch) == 0 or count < 1:
        raise InputError(f"batch has {len(batch)} images and count is {count}, expected at least one of each")
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"mean is {tuple(mean)} and std {tuple(std)}, expected three numbers each")
    shown = min(count, len(batch))
    images = to_pictures(batch.images[:shown], mean, std)
    rows = [
        draw_row(images[i], batch.captions[i], ask(model, batch, i, tokenizer, region_length)) for i in range(shown)
    ]
    header = draw_header(max(row.width for row in rows), shown, can_ground=model.prompter is not None)
    sheet = Image.new("RGB", (header.width, header.height + sum(row.height for row in rows)), PAPER)
    top = 0
    for part in [header, *rows]:
        sheet.paste(part, (0, top))
        top += part.height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def ask(model: CllipModel, batch: Batch, i: int, tokenizer: Tokenizer, region_length: int) -> list[Answer]:
    """The model's answers for the distinct phrases of image `i` of a batch, on the CPU."""
    phrases = list(dict.fromkeys(batch.phrases[i]))
    if not phrases:
        return []
    device = next(model.parameters()).device
    tokens = model.image_tokens(batch.images[i : i + 1].to(device))
    texts = unit(model.encode_text(tokenizer(phrases, region_length).to(device)))
    maps = (texts @ unit(model.encode_patches(tokens))[0].T).unflatten(1, model.config.patch_grid).cpu()
    predicted = model.ground(tokens, texts[None])[0].float().cpu() if model.prompter is not None else None
    boxes = batch.boxes[i][batch.region_mask[i]].float().cpu()
    answers = []
    for k, phrase in enumerate(phrases):
        own = boxes[[j for j, text in enumerate(batch.phrases[i]) if text == phrase]]
        box = None if predicted is None else predicted[k]
        iou = None if box is None else float(box_iou(box, own).max())
        answers.append(Answer(phrase, own, maps[k], box, iou))
    return answers


def to_pictures(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """Normalised images [B, 3, H, W] as pictures, enlarged by a whole number to about 256 pixels."""
    shift, scale = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (mean, std))
    pixels = ((images.float().cpu() * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    times = max(1, round(256 / max(images.shape[-2:])))
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in pixels]
    size = (images.shape[-1] * times, images.shape[-2] * times)
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]


def draw_row(picture: Image.Image, captions: list[str], answers: list[Answer]) -> Image.Image:
    """One image's row: caption; boxes; phrases; maps. Its size depends on the picture's size alone."""
    width, height = picture.size
    row = Image.new("RGB", (2 * GAP + width + LEGEND_WIDTH + MAPS * (width + GAP), height + 2 * LINE + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(row)
    draw.line((GAP, 0, row.width - GAP, 0), FAINT)
    caption = f"“{captions[0]}”" if captions else "(no caption)"
    for k, line in enumerate(wrap(caption, width + LEGEND_WIDTH - 60, TEXT, lines=2)):
        write(draw, (GAP, 5 + k * LINE), line, TEXT)

    top, left = 2 * LINE + 6, 2 * GAP + width
    colours = [PALETTE[k % len(PALETTE)] for k in range(len(answers))]
    paste(row, draw_boxes(picture, answers, colours), (GAP, top))
    write_phrases(draw, (left, top), answers, colours, lines=height // LINE)
    for k, answer in enumerate(answers[:MAPS]):
        x = left + LEGEND_WIDTH + k * (width + GAP)
        swatch(draw, (x, 7), colours[k])
        write(draw, (x + 20, 5), cut(answer.phrase, width - 20, TEXT), TEXT)
        low, high = answer.similarity.aminmax()
        write(draw, (x, 5 + LINE), f"cosine {low:z.2f} to {high:z.2f}", SMALL, FAINT)
        panel = heat_panel(picture, answer.similarity)
        for box in answer.boxes:
            outline(ImageDraw.Draw(panel), to_pixels(box, picture), colours[k])
        paste(row, panel, (x, top))
    return row


def draw_boxes(picture: Image.Image, answers: list[Answer], colours: list[Colour]) -> Image.Image:
    """The picture with the true boxes and over them the predicted ones."""
    marked = picture.copy()
    draw = ImageDraw.Draw(marked)
    for answer, colour in zip(answers, colours, strict=True):
        for box in answer.boxes:
            outline(draw, to_pixels(box, picture), colour)
    for answer, colour in zip(answers, colours, strict=True):
        if answer.predicted is not None:
            outline(draw, to_pixels(answer.predicted, picture), colour, dashed=True)
    return marked


def write_phrases(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], answers: list[Answer], colours: list[Colour], lines: int
) -> None:
    """Colour, phrase and IoU, a line each; how many more there are where they do not all fit."""
    x, y = place
    figures = x + LEGEND_WIDTH - 48
    if any(answer.iou is not None for answer in answers):
        write(draw, (figures, y - LINE), "IoU %", SMALL, FAINT)
    fitting = answers if len(answers) <= lines else answers[: lines - 1]
    for answer, colour in zip(fitting, colours, strict=False):
        swatch(draw, (x, y + 2), colour)
        times = f" ({len(answer.boxes)})" if len(answer.boxes) > 1 else ""
        room = figures - x - 26 - text_width(times, TEXT)
        write(draw, (x + 20, y), cut(answer.phrase, room, TEXT) + times, TEXT)
        if answer.iou is not None:
            write(draw, (figures, y), f"{100 * answer.iou:.0f}", TEXT, FAINT)
        y += LINE
    if len(fitting) < len(answers):
        write(draw, (x + 20, y), f"and {len(answers) - len(fitting)} more", TEXT, FAINT)


def to_pixels(box: Tensor, picture: Image.Image) -> tuple[float, float, float, float]:
    """A box [4] in [0, 1] as the pixels of its border, inside the picture."""
    x0, y0, x1, y1 = box.clamp(0, 1).nan_to_num(0.0).tolist()
    right, bottom = picture.width - 1, picture.height - 1
    return (x0 * right, y0 * bottom, max(x0, x1) * right, max(y0, y1) * bottom)


def draw_header(width: int, count: int, *, can_ground: bool) -> Image.Image:
    """What the lines and colours mean."""
    header = Image.new("RGB", (width, HEADER_HEIGHT), PAPER)
    draw = ImageDraw.Draw(header)
    write(draw, (GAP, 8), f"{count} image{'s' * (count > 1)}: boxes and text-patch maps", 20)
    x, y = GAP, 48
    boxes = [("ground-truth box", False)]
    if can_ground:
        boxes.append(("box predicted from the phrase; beside the phrase: IoU in %", True))
    for name, dashed in boxes:
        outline(draw, (x, y, x + 30, y + 20), PALETTE[0], dashed=dashed)
        write(draw, (x + 40, y + 1), name, TEXT)
        x += 40 + text_width(name, TEXT) + 28
    if not can_ground:
        write(draw, (x, y + 1), "no predicted boxes: this model cannot ground", TEXT)
        x += text_width("no predicted boxes: this model cannot ground", TEXT) + 28
    header.paste(colour_bar(60, 20), (x, y))
    name = "cosine of the phrase with each patch, lowest to highest of the map"
    write(draw, (x + 70, y + 1), name, TEXT)
    x += 70 + text_width(name, TEXT) + 36
    draw.rectangle((x - 12, y - 2, x + 12, y + 22), FAINT)
    mark_peak(draw, (x, y + 10))
    write(draw, (x + 22, y + 1), "its peak", TEXT)
    return header
