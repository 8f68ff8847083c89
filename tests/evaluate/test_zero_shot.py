"""Zero-shot tasks against planted features and plain counting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.evaluate.classification import classification
from cllip_fast.evaluate.compositional import compositional, read_pairs
from cllip_fast.evaluate.segmentation import confusion, list_pairs, read_mask, segmentation
from cllip_fast.evaluate.templates import class_features, read_templates
from tests.ranks import on_ranks


class Planted:
    """Texts have planted features; an image's are its pixels."""

    device = torch.device("cpu")

    def __init__(self, texts: dict[str, Tensor] | None = None) -> None:
        self.texts, self.encoded = texts or {}, 0

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pixels.flatten(1), dim=1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([torch.nn.functional.normalize(self.texts[text], dim=0) for text in texts])

    def preprocess(self, path: Path) -> Tensor:
        try:
            return torch.tensor(json.loads(path.read_text()))
        except OSError as error:
            raise InputError(f"{path} cannot be read") from error

    def similarity_map(self, image: Path, classes: Tensor) -> Tensor:
        """The class features times the pixel's colour."""
        self.encoded += 1
        colours = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).float()
        return torch.einsum("ce,hwe->chw", classes, colours)

    def lay_over(self, maps: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The first column is not looked at."""
        assert image_size == size == maps.shape[:0:-1]
        return maps.index_fill(2, torch.tensor([0]), torch.nan)


def test_classes_are_the_mean_of_their_sentences() -> None:
    texts = {"a cat": [2.0, 0.0], "the cat": [0.0, 5.0], "a dog": [1.0, 0.0], "the dog": [1.0, 0.0]}
    model = Planted({text: torch.tensor(feature) for text, feature in texts.items()})
    features = class_features(model, ["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(features, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
    with pytest.raises(InputError, match="'cat' twice"):
        class_features(model, ["cat", "cat"], ["a {}"])


def test_templates(tmp_path: Path) -> None:
    assert read_templates("photo") == ["a photo of a {}."]
    openai = read_templates("openai")
    assert len(openai) == 80
    assert "a photo of the {}." in openai
    file = tmp_path / "t.txt"
    file.write_text("art of a {}\n\n{} at night\n")
    assert read_templates(file) == ["art of a {}", "{} at night"]
    file.write_text("no place\n")
    with pytest.raises(InputError, match="'no place' is no template"):
        read_templates(file)
    with pytest.raises(InputError, match="expected plain, photo, openai or a text file"):
        read_templates("imagenet")


def labelled(seed: int = 0) -> list[tuple[Tensor | None, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = [(torch.randn(n, 8, generator=generator), torch.randint(0, 7, (n,), generator=generator)) for n in (9, 4)]
    return [*images, (None, torch.tensor([3]))]


def test_accuracy_is_that_of_plain_counting() -> None:
    classes = torch.nn.functional.normalize(torch.randn(7, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    metrics = classification(Planted(), labelled(), classes)
    top1, top5, by_class = 0, 0, {}
    for images, labels in labelled()[:2]:
        for image, label in zip(images, labels.tolist(), strict=True):
            order = sorted(range(7), key=lambda c: -float(image @ classes[c]))
            top1 += order[0] == label
            top5 += label in order[:5]
            by_class.setdefault(label, []).append(order[0] == label)
    assert metrics["images"] == 13
    assert metrics["skipped"] == 1
    assert metrics["top1"] == pytest.approx(top1 / 13)
    assert metrics["top5"] == pytest.approx(top5 / 13)
    assert metrics["mean_class"] == pytest.approx(np.mean([np.mean(each) for each in by_class.values()]))


def test_a_collapsed_model_is_never_right() -> None:
    same = torch.ones(6, 8) / 8**0.5
    assert classification(Planted(), labelled()[:1], torch.cat([same, same[:1]]))["top1"] == 0
    broken = [(torch.full((2, 8), torch.nan), torch.tensor([0, 1]))]
    metrics = classification(Planted(), broken, torch.eye(8))
    assert metrics["top1"] == metrics["top5"] == 0
    assert classification(Planted(), [], torch.eye(8))["top1"] is None


def classify_share(rank: int, world_size: int) -> dict[str, float | None]:
    own = labelled()[rank::world_size]
    return classification(Planted(), own, torch.eye(7, 8), group=dist.group.WORLD)


def test_ranks_count_together() -> None:
    results = on_ranks(2, classify_share)
    assert results[0] == results[1] == classification(Planted(), labelled(), torch.eye(7, 8))


def paint(folder: Path, name: str, colours: list[list[list[int]]], mask: list[list[int]]) -> None:
    for kind, values in (("images", colours), ("masks", mask)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(np.array(values, dtype=np.uint8)).save(folder / kind / f"{name}.png")


RED, GREEN, BLUE = [200, 0, 0], [0, 200, 0], [0, 0, 200]


def test_segmentation_of_a_worked_case(tmp_path: Path) -> None:
    # The first column is not looked at; 255 does not count.
    paint(tmp_path, "a", [[RED, RED, GREEN, BLUE], [RED, GREEN, GREEN, BLUE]], [[0, 0, 1, 1], [0, 0, 255, 2]])
    pairs = list_pairs(tmp_path / "images", tmp_path / "masks")
    metrics = segmentation(Planted(), pairs, ["red", "green", "blue", "none"], torch.eye(4, 3))
    # True, predicted, both: red 4, 1, 1; green 2, 2 (a third does not count), 1; blue 1, 2, 1.
    assert metrics["miou"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 2) / 3)  # the fourth class does not occur
    assert metrics["pixel_accuracy"] == pytest.approx(3 / 7)
    assert metrics["images"] == 1
    ignored = segmentation(Planted(), pairs, ["red", "green", "blue", "none"], torch.eye(4, 3), ignore=255)
    assert ignored == metrics


def test_classes_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many classes, an image is encoded once; the tile of the closest class does not matter."""
    paint(tmp_path, "a", [[RED, RED, GREEN, BLUE]] * 2, [[0, 1, 2, 3]] * 2)
    pairs, classes = list_pairs(tmp_path / "images", tmp_path / "masks"), torch.eye(4, 3).flip(0)
    names = ["none", "blue", "green", "red"]
    model = Planted()
    expected = segmentation(model, pairs, names, classes)
    for step in (1, 3):
        monkeypatch.setattr("cllip_fast.evaluate.segmentation.TILE", step * 8)
        assert segmentation(model, pairs, names, classes) == expected
    assert model.encoded == 3


def test_an_ignored_class_is_no_candidate(tmp_path: Path) -> None:
    paint(tmp_path, "a", [[RED, RED, GREEN]], [[0, 0, 1]])
    pairs = list_pairs(tmp_path / "images", tmp_path / "masks")
    metrics = segmentation(Planted(), pairs, ["red", "green"], torch.eye(2, 3), ignore=0)
    assert metrics["miou"] == metrics["pixel_accuracy"] == 1  # one pixel counts, and green is the only answer


def test_confusion_equals_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(-1, 4, (9, 7), generator=generator)
    truth = torch.randint(0, 5, (9, 7), generator=generator)
    truth[truth == 4] = 255
    counts = confusion(predicted, truth, 4, 255)
    for c in range(4):
        seen = [(int(p), int(t)) for p, t in zip(predicted.flatten(), truth.flatten(), strict=True) if t != 255]
        expected = [sum(t == c for _, t in seen), sum(p == c for p, _ in seen), sum(p == t == c for p, t in seen)]
        assert counts[c].tolist() == expected


def test_bad_masks_are_named(tmp_path: Path) -> None:
    paint(tmp_path, "a", [[RED, RED]], [[0, 7]])
    with pytest.raises(InputError, match="has the number 7, expected 0 to 2, or 255 to ignore"):
        read_mask(tmp_path / "masks" / "a.png", 3, 255)
    paint(tmp_path, "b", [[RED]], [[0, 1]])
    metrics = segmentation(Planted(), [(tmp_path / "images" / "b.png", tmp_path / "masks" / "b.png")],
                           ["x", "y"], torch.eye(2, 3))  # fmt: skip
    assert (metrics["images"], metrics["skipped"], metrics["miou"]) == (0, 1, None)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"mask .*a.png has no image"):
        list_pairs(tmp_path / "images", tmp_path / "masks")


def test_compositional_pairs(tmp_path: Path) -> None:
    for name, feature in (("x", [1.0, 0.0]), ("y", [0.0, 1.0])):
        (tmp_path / name).write_text(json.dumps(feature))
    entry = {"filename": "x", "caption": "east", "negative_caption": "north"}
    swapped = {"filename": "x", "caption": "north", "negative_caption": "east"}
    tie = {"filename": "y", "caption": "north", "negative_caption": "north too"}
    lost = {"filename": "z", "caption": "east", "negative_caption": "north"}
    (tmp_path / "swap_obj.json").write_text(json.dumps({"0": entry, "1": swapped, "2": tie, "3": lost}))
    (tmp_path / "several.json").write_text(json.dumps({"add_att": [entry], "add_obj": {"7": entry}}))
    model = Planted({"east": torch.tensor([1.0, 0.1]), "north": torch.tensor([0.0, 1.0]),
                     "north too": torch.tensor([0.0, 1.0])})  # fmt: skip
    pairs = read_pairs([tmp_path / "swap_obj.json", tmp_path / "several.json"], tmp_path)
    metrics = compositional(model, pairs, batch=2)
    assert metrics == {
        "images": 5, "skipped": 1, "swap_obj": pytest.approx(1 / 3), "add_att": 1, "add_obj": 1,
        "compositional": pytest.approx(7 / 9),
    }  # fmt: skip
    (tmp_path / "several.json").write_text(json.dumps([{"filename": "x", "caption": "east"}]))
    with pytest.raises(InputError, match="pair 0 of several lacks a text"):
        read_pairs([tmp_path / "several.json"], tmp_path)
