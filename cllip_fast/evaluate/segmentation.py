"""Zero-shot segmentation: each pixel gets the class that its patch features are closest to; mean IoU.

As in Zhou et al. (MaskCLIP, arXiv 2112.01071) without its refinements: the cosines of patches and classes are brought
to the image's size by bilinear interpolation, then the largest wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cllip_fast.errors import InputError
from cllip_fast.evaluate.ranks import bar_is_off, share_of, summed

if TYPE_CHECKING:
    from cllip_fast.inference import TrainedModel

TILE = 1 << 24  # cosines held at once: 64 MiB


def segmentation(
    model: TrainedModel,
    pairs: Sequence[tuple[Path, Path]],
    names: Sequence[str],
    classes: Tensor,
    *,
    ignore: int = 255,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float | None]:
    """Zero-shot segmentation of images.

    Args:
        model: from `cllip_fast.load`, with exif=False: masks are of the pixels as stored.
        pairs: each image with its mask, a grey or palette PNG of class numbers in the size of the image.
        names: C class names.
        classes: their features [C, E], from `class_features`.
        ignore: the number of pixels that do not count; a class of that number is no candidate.
        group: the ranks that share the images; all return the same.

    Returns:
        images and skipped, how many (skipped: cannot be read, or not of its mask's size); miou, over the classes that
        occur in a mask or a prediction; pixel_accuracy. A pixel that the model does not look at (crop "center") is a
        miss of its class.

    Raises:
        InputError: a mask that cannot be read, or has a number that is no class.
    """
    candidates = torch.tensor([number for number in range(len(names)) if number != ignore])
    counts = torch.zeros(len(names), 3, dtype=torch.int64)  # pixels of the class, predicted as it, both
    images = skipped = 0
    for image, mask in tqdm(
        share_of(pairs, group), desc="segment", unit="image", leave=False, disable=bar_is_off(group)
    ):
        truth = read_mask(mask, len(names), ignore)
        try:
            predicted = segment(model, image, classes[candidates.to(classes.device)], truth.shape).cpu()
        except InputError as error:
            tqdm.write(f"skipped: {error}")
            skipped += 1
            continue
        images += 1
        counts += confusion(torch.cat([candidates, torch.tensor([-1])])[predicted], truth, len(names), ignore)
    counts, done = summed(counts, group), summed(torch.tensor([images, skipped]), group)
    true, guessed, both = counts.double().unbind(1)
    union = true + guessed - both
    return {
        "images": float(done[0]),
        "skipped": float(done[1]),
        "miou": float((both / union)[union > 0].mean()) if union.any() else None,
        "pixel_accuracy": float(both.sum() / true.sum()) if true.any() else None,
    }


def segment(model: TrainedModel, image: Path, classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Number [height, width] int64 of the closest of C classes for each pixel, -1 where the model does not look.

    Raises:
        InputError: the image cannot be read, or is not of the `size` (height, width).
    """
    height, width = size
    best = torch.full(size, -torch.inf, device=model.device)
    number = torch.full(size, -1, device=model.device)
    with Image.open(image) as opened:
        if opened.size != (width, height):
            raise InputError(f"{image} has {opened.width}×{opened.height} pixels, its mask {width}×{height}")
    maps = model.similarity_map(image, classes)
    step = max(1, TILE // (height * width))
    for first in range(0, len(classes), step):
        value, place = model.lay_over(maps[first : first + step], (width, height), (width, height)).max(0)
        better = value > best  # false for NaN
        best, number = torch.where(better, value, best), torch.where(better, place + first, number)
    return number


def read_mask(path: Path, classes: int, ignore: int) -> Tensor:
    """Class numbers [height, width] int64 of a mask."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I;16", "I"):
                raise InputError(f"{path} is an image of mode {image.mode}, expected grey or palette: class numbers")
            mask = torch.from_numpy(np.array(image).astype(np.int64))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    wrong = mask[(mask >= classes) & (mask != ignore)]
    if len(wrong):
        raise InputError(f"{path} has the number {int(wrong[0])}, expected 0 to {classes - 1}, or {ignore} to ignore")
    return mask


def confusion(predicted: Tensor, truth: Tensor, classes: int, ignore: int) -> Tensor:
    """Pixels [classes, 3] of each class: true, predicted, both; those to be ignored do not count. -1 predicts none."""
    counted = truth != ignore
    predicted, truth = predicted[counted], truth[counted]
    return torch.stack(
        [
            torch.bincount(truth, minlength=classes),
            torch.bincount(predicted[predicted >= 0], minlength=classes),
            torch.bincount(truth[predicted == truth], minlength=classes),
        ],
        1,
    )


def list_pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Each mask `<name>.png` with the image `<name>.*`, ordered by name.

    Raises:
        InputError: a mask without its image, or no masks.
    """
    from cllip_fast.convert.images import list_images

    for name, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise InputError(f"{name} folder {folder} does not exist")
    image_of = {str(Path(name).with_suffix("")): images / name for name in list_images(images)}
    found = [(image_of.get(str(Path(name).with_suffix(""))), masks / name) for name in list_images(masks)]
    lonely = next((mask for image, mask in found if image is None), None)
    if lonely is not None:
        raise InputError(f"the mask {lonely} has no image of that name in {images}")
    if not found:
        raise InputError(f"masks folder {masks} holds no images")
    return found
