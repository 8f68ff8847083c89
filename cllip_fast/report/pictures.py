"""The page's pictures: images with their boxes and maps, cards of failures, the Prompter's attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cllip_fast.report.attention import Look, covered_share
from cllip_fast.report.failures import BoxFailure, ImageFailure, RegionFailure
from cllip_fast.report.html import Html, image, join, tag
from cllip_fast.show.canvas import PALETTE, Colour, outline
from cllip_fast.show.heat import colour_bar, heat_panel
from cllip_fast.show.sheet import MAPS, Answer, draw_boxes, to_pixels

LONGEST = 200  # characters of a text beside a picture
CARD_LINE = 4  # pixels of a picture that is shown at about half its size


def legend(*, predicted: bool, maps: str | None = None) -> Html:
    """What lines and colours mean; `maps`: of what the heat maps are."""
    parts = [tag("span", class_="solid"), " ground-truth box. "]
    if predicted:
        parts += [tag("span", class_="dashed"), " box predicted from the phrase. "]
    if maps:
        bar = image(colour_bar(60, 14), "colours from dark blue over orange to pale yellow")
        parts += [bar, f" {maps}, lowest to highest of each map; the ring marks the peak."]
    return tag("p", *parts, class_="faint")


def picture_row(picture: Image.Image, caption: str, answers: list[Answer]) -> Html:
    """An image with the boxes of its phrases, and the maps of the first of them."""
    colours = [PALETTE[k % len(PALETTE)] for k in range(len(answers))]
    boxes = tag(
        "figure",
        image(draw_boxes(picture, answers, colours), f"Image of “{caption}” with the boxes of its phrases"),
        tag("ul", *map(_phrase, answers, colours), class_="phrases") if answers else _caption("no regions"),
    )
    maps = [
        _map(picture, answer.similarity, f"Similarity of “{answer.phrase}” to the patches", answer.boxes, colour,
             _swatch(colour), " ", _isolated(answer.phrase), " ", _faint(_span(answer.similarity)))
        for answer, colour in list(zip(answers, colours, strict=True))[:MAPS]
    ]  # fmt: skip
    return tag("article", tag("p", _quoted(caption, len(caption))), tag("div", boxes, *maps, class_="panels"))


def image_card(failure: ImageFailure, picture: Image.Image, key: str) -> Html:
    if failure.said is None:
        said = "no other caption to confuse it with"
    else:
        place = "stood first" if failure.rank > 1 else "stood next"
        said = join(f"{place}: ", _said(failure.said, failure.said_cosine))
    return _card(
        image(picture, f"Image {key}"),
        _strong(f"loss {failure.loss:.2f}", f"own caption ranks {_ordinal(failure.rank)}"),
        join("own: ", _said(failure.caption, failure.cosine)),
        said,
        _faint(key),
    )


def region_card(failure: RegionFailure, picture: Image.Image, key: str) -> Html:
    if failure.said is None:
        said = "no other phrase to confuse it with"
    else:
        instead = failure.said_cosine >= failure.cosine
        said = join("said instead: " if instead else "next: ", _said(failure.said, failure.said_cosine))
    return _card(
        image(_outlined(picture, [failure.box]), f"Image {key} with the box of “{failure.phrase}”"),
        _strong(f"loss {failure.loss:.2f}"),
        join("true: ", _said(failure.phrase, failure.cosine)),
        said,
        _faint(key),
    )


def box_card(failure: BoxFailure, picture: Image.Image, key: str) -> Html:
    marked = _outlined(picture, failure.boxes, failure.predicted)
    return _card(
        image(marked, f"Image {key} with the true and the predicted box of “{failure.phrase}”"),
        _strong(f"loss {failure.loss:.2f}", f"IoU {_percent(failure.iou)}"),
        join(_quoted(failure.phrase), f", {len(failure.boxes)} boxes" if len(failure.boxes) > 1 else None),
        _faint(key),
    )


def attention_row(picture: Image.Image, answer: Answer, box: Look | None, text: Look | None) -> Html:
    """A phrase's boxes, and what the prompt of its first box and its own prompt look at."""
    several, first = len(answer.boxes) > 1, answer.boxes[:1]
    covers = f" {len(answer.boxes)} boxes cover" if several else " its box covers"
    covers += f" {_percent(covered_share(answer.boxes))} of the image"
    if several:
        covers += f", the first {_percent(covered_share(first))}"
    panels = [
        tag(
            "figure",
            image(_outlined(picture, answer.boxes, answer.predicted), f"Image with the boxes of “{answer.phrase}”"),
            _caption(tag("strong", _isolated(answer.phrase)), _faint(covers)),
        )
    ]
    for look, name, boxes in ((box, "box prompt", first), (text, "phrase prompt", answer.boxes)):
        if look is not None:
            place = "boxes" if len(boxes) > 1 else "box"
            share = f" {_percent(look.inside(boxes))} in the {place}; {_percent(look.own)} stays in the prompt"
            alt = f"Attention of the {name} of “{answer.phrase}” over the patches"
            panels.append(_map(picture, look.patches, alt, boxes, PALETTE[0], tag("strong", name), _faint(share)))
    return tag("div", *panels, class_="panels")


def _map(
    picture: Image.Image, values: Tensor, alt: str, boxes: Sequence[Tensor], colour: Colour, *caption: object
) -> Html:
    panel = heat_panel(picture, values)
    for box in boxes:
        outline(ImageDraw.Draw(panel), to_pixels(box, picture), colour)
    return tag("figure", image(panel, alt), _caption(*caption))


def _outlined(picture: Image.Image, boxes: Sequence[Tensor], predicted: Tensor | None = None) -> Image.Image:
    """The picture with true boxes, and a predicted one in another colour over them."""
    marked = picture.copy()
    draw = ImageDraw.Draw(marked)
    for box in boxes:
        outline(draw, to_pixels(box, picture), PALETTE[0], width=CARD_LINE)
    if predicted is not None:
        outline(draw, to_pixels(predicted, picture), PALETTE[1], dashed=True, width=CARD_LINE)
    return marked


def _phrase(answer: Answer, colour: Colour) -> Html:
    times = f" ({len(answer.boxes)})" if len(answer.boxes) > 1 else ""
    iou = _faint(f" IoU {_percent(answer.iou)}") if answer.iou is not None else None
    return tag("li", _swatch(colour), " ", _isolated(answer.phrase), times, iou)


def _card(picture: Html, *lines: object) -> Html:
    return tag("li", picture, tag("div", *(tag("p", line) for line in lines)), class_="card")


def _strong(*figures: str) -> Html:
    return tag("strong", " · ".join(figures))


def _faint(text: str) -> Html:
    return tag("span", text, class_="faint")


def _caption(*parts: object) -> Html:
    return tag("figcaption", join(*parts))


def _swatch(colour: Colour) -> Html:
    return tag("span", class_="swatch", style=f"background: rgb{colour}")


def _span(values: Tensor) -> str:
    low, high = torch.aminmax(values)
    return f"cosine {low:z.2f} to {high:z.2f}"


def _said(text: str, cosine: float) -> Html:
    return join(_quoted(text), f" (cosine\N{NO-BREAK SPACE}{cosine:z.2f})")


def _quoted(text: str, longest: int = LONGEST) -> Html:
    return join("“", _isolated(text, longest), "”")


def _isolated(text: str, longest: int = LONGEST) -> Html:
    """Text of the data, whose direction of writing does not reach what stands around it; a long one is cut."""
    if len(text) <= longest:
        return tag("bdi", text)
    return tag("bdi", text[:longest].rstrip() + "…", title=text)


def _percent(share: float) -> str:
    return f"{100 * share:.{int(0 < share < 0.01)}f}\N{NO-BREAK SPACE}%"


def _ordinal(rank: int) -> str:
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"
