"""Text-patch similarity as a heat map over the image."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from cllip_fast.show.canvas import INK

# Dark blue over violet and orange to pale yellow: lightness rises all the way, so the map survives grey print.
_STOPS = np.array([(16, 16, 70), (86, 28, 130), (186, 54, 96), (244, 128, 40), (254, 236, 150)], dtype=np.float64)


def colour_map(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape [...] to colours [..., 3] uint8."""
    place = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    below = np.minimum(place.astype(int), len(_STOPS) - 2)
    share = (place - below)[..., None]
    return (_STOPS[below] * (1 - share) + _STOPS[below + 1] * share).round().astype(np.uint8)


def heat_panel(image: Image.Image, similarity: Tensor, *, opacity: float = 0.62) -> Image.Image:
    """The image under its similarity map, the best patch's centre marked by a ring and a cross.

    Args:
        image: at the size of the panel.
        similarity: [h, w], scaled to the colours from its own minimum to its own maximum; each patch is one flat cell.
        opacity: of the map.
    """
    values = similarity.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0).numpy()
    low, high = values.min(), values.max()
    colours = colour_map((values - low) / max(high - low, 1e-9))
    heat = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    panel = Image.blend(image.convert("L").convert("RGB"), heat, opacity)
    row, column = _peak(values)
    mark_peak(
        ImageDraw.Draw(panel),
        ((column + 0.5) * image.width / values.shape[1], (row + 0.5) * image.height / values.shape[0]),
    )
    return panel


def _peak(values: np.ndarray) -> tuple[int, int]:
    """Row and column of the highest value; of several alike, as at the image's edges, the one in their middle."""
    highest = np.argwhere(values == values.max())
    return tuple(highest[np.square(highest - highest.mean(0)).sum(1).argmin()].tolist())


def mark_peak(draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: int = 7) -> None:
    """A white ring with a cross, dark at its edges, around a point."""
    x, y = centre
    for colour, width in ((INK, 4), ((255, 255, 255), 2)):
        grow = (width - 2) / 2
        draw.ellipse((x - radius - grow, y - radius - grow, x + radius + grow, y + radius + grow), None, colour, width)
        draw.line((x - radius, y, x + radius, y), colour, width)
        draw.line((x, y - radius, x, y + radius), colour, width)


def colour_bar(width: int, height: int) -> Image.Image:
    """The map's colours from lowest (left) to highest."""
    return Image.fromarray(np.tile(colour_map(np.linspace(0, 1, width)), (height, 1, 1)))
