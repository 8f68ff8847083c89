"""The metrics of `cllip-fast eval --task shards` once more, from the annotations up: tar, JSON, NumPy in fp64, loops.

Nothing of `cllip_fast.evaluate` or of the loader is used. Features come from `cllip_fast.load`'s methods, boxes reach
the model's square by arithmetic of this file. Whole matrices of scores are kept: that is the difference under test.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cllip_fast.inference import TrainedModel

NEAR = 1e-6  # of two cosines: fp32 features made in batches of other sizes differ by less


class Seen(NamedTuple):
    """One image with its texts and boxes."""

    image: Path
    captions: list[str]
    boxes: np.ndarray  # [M, 4], xyxy in pixels
    phrases: list[str]


def read_shards(folder: Path, pictures: Path) -> list[Seen]:
    """The samples of a folder of shards; their pictures, unpacked, go into the folder `pictures`."""
    seen = []
    pictures.mkdir()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for name in sorted(name for name in files if name.endswith(".json")):
            facts, picture = json.loads(files[name]), pictures / f"{len(seen)}.jpg"
            picture.write_bytes(files[name.replace(".json", ".jpg")])
            regions = facts.get("regions", [])
            boxes = np.array([region["box"] for region in regions], dtype=float).reshape(-1, 4)
            seen.append(Seen(picture, facts["captions"], boxes, [region["text"] for region in regions]))
    return seen


def recompute(model: TrainedModel, seen: list[Seen], classes: list[str]) -> dict[str, tuple[float, float]]:
    """The least and the largest value of each metric that rounding of the features allows: nearly always the same.

    The model must have been trained with crop "pad".
    """
    images = _numbers(model.encode_image([one.image for one in seen]))
    owners = np.repeat(np.arange(len(seen)), [len(one.captions) for one in seen])
    captions = [text for one in seen for text in one.captions]
    scores = images @ _numbers(model.encode_text(captions)).T  # [images, captions], repeated ones included
    right = np.array([[text in one.captions for text in captions] for one in seen])
    assert right[owners, np.arange(len(captions))].all()
    found = {}
    for k in (1, 5, 10):
        found[f"i2t_r{k}"] = _recall(scores, right, k)
        found[f"t2i_r{k}"] = _recall(scores.T, right.T, k)

    with_regions = [one for one in seen if one.phrases]
    phrases = [text for one in with_regions for text in one.phrases]
    features = _numbers(model.encode_regions([one.image for one in with_regions], [one.boxes for one in with_regions]))
    assert len(features) == len(phrases)
    scores = features @ _numbers(model.encode_phrases(phrases)).T
    numbers = np.unique(phrases, return_inverse=True)[1]
    right = numbers[:, None] == numbers[None, :]
    for k in (1, 10):
        found[f"r2t_r{k}"] = _recall(scores, right, k)
        found[f"t2r_r{k}"] = _recall(scores.T, right.T, k)

    known = [place for place, text in enumerate(phrases) if text in classes]
    scores = features[known] @ _numbers(model.encode_phrases(classes)).T
    labels = [classes.index(phrases[place]) for place in known]
    low, high = [], []  # right beyond doubt, perhaps right
    for row, label in zip(scores, labels, strict=True):
        others = np.delete(row, label).max()
        low.append(row[label] > others + NEAR)
        high.append(row[label] > others - NEAR)
    found["recognition_top1"] = (np.mean(low), np.mean(high))
    found["recognition_mean_class"] = tuple(
        np.mean([np.mean([hit for hit, own in zip(hits, labels, strict=True) if own == c]) for c in set(labels)])
        for hits in (low, high)
    )
    return found | {name: (value, value) for name, value in _places(model, with_regions).items()}


def _places(model: TrainedModel, seen: list[Seen]) -> dict[str, float]:
    """Grounding, referring, pointing: one phrase of one image after the other."""
    best, own, hits = [], [], []
    side = model.model.config.image_size
    for image, _, pixels, phrases in seen:
        with Image.open(image) as opened:
            size = np.array(opened.size)
        inner = np.round(size * (side / size.max()))
        boxes = pixels * np.tile(inner / size, 2) + np.tile((side - inner) // 2, 2)
        asked = list(dict.fromkeys(phrases))
        with torch.no_grad():
            tokens = model.model.image_tokens(model.preprocess(image)[None])
            predicted = _numbers(model.model.ground(tokens, model.encode_phrases(asked)[None])[0]) * side
        maps = _numbers(model.similarity_map(image, asked))
        for phrase, guess, patches in zip(asked, predicted, maps, strict=True):
            mine = [box for box, text in zip(boxes, phrases, strict=True) if text == phrase]
            fits = [_iou(guess, box) for box in mine]
            best.append(max(fits))
            own += fits
            row, column = np.unravel_index(patches.argmax(), patches.shape)
            x, y = (column + 0.5) * side / patches.shape[1], (row + 0.5) * side / patches.shape[0]
            hits.append(any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in mine))
    return {
        "grounding_acc50": np.mean(np.array(best) >= 0.5),
        "grounding_iou": np.mean(best),
        "referring_acc50": np.mean(np.array(own) >= 0.5),
        "referring_iou": np.mean(own),
        "pointing": np.mean(hits),
    }


def _recall(scores: np.ndarray, right: np.ndarray, k: int) -> tuple[float, float]:
    """Share of rows with a right entry among the k largest, with near ties against the row and for it."""
    low = high = 0
    for row, mine in zip(scores, right, strict=True):
        before = np.sort(row[~mine])[-k:].min() if (~mine).sum() >= k else -np.inf  # k wrong ones are at least this
        low += before < row[mine].max() - NEAR
        high += before < row[mine].max() + NEAR
    return low / len(scores), high / len(scores)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().numpy()
