"""What the report sorts: each loss against a plain computation, from the features up and from the model up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cllip_fast.data import create_loader
from cllip_fast.inference import TrainedModel, load
from cllip_fast.losses import ClipLoss, GroundingLoss
from cllip_fast.report.failures import worst_boxes, worst_images, worst_regions
from cllip_fast.report.sample import Sample, first_batches, take_sample
from tests.saved_run import save_run

SCALE = 7.0


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def made_up() -> Sample:
    """5 images, of which the third has no caption and two share one; 7 regions of 4 phrases; boxes at random."""
    region_image = torch.tensor([0, 0, 1, 3, 3, 3, 4])
    region_phrase = torch.tensor([0, 1, 2, 3, 3, 0, 1])  # the fourth image holds its phrase twice
    captions = ["a", "b", "a", "d"]
    texts = unit(4, 8)
    texts[2] = texts[0]
    low = torch.rand(7, 2) * 0.5
    asked = torch.stack([region_image, region_phrase], 1).unique(dim=0)
    predicted = torch.rand(len(asked), 2) * 0.5
    return Sample(
        keys=list("vwxyz"),
        pictures=[Image.new("RGB", (4, 4))] * 5,
        captions=captions,
        caption_image=torch.tensor([0, 1, 3, 4]),
        image_features=unit(5, 8),
        caption_features=texts,
        region_image=region_image,
        region_phrase=region_phrase,
        boxes=torch.cat([low, low + 0.1 + 0.4 * torch.rand(7, 2)], 1),
        region_features=unit(7, 8),
        phrases=["p", "q", "r", "s"],
        phrase_features=unit(4, 8),
        asked=asked,
        predicted=torch.cat([predicted, predicted + 0.3], 1),
    )


def entropy(scores: list[float], own: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[own]


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_images() -> None:
    sample = made_up()
    found = worst_images(sample, SCALE)
    images, texts = sample.image_features[sample.caption_image], sample.caption_features
    scores = [[SCALE * dot(image, text) for text in texts] for image in images]
    expected = {}
    for k, image in enumerate(sample.caption_image.tolist()):
        column = [row[k] for row in scores]
        others = {
            text: score for text, score in zip(sample.captions, scores[k], strict=True) if text != sample.captions[k]
        }
        said = max(others, key=others.get)
        rank = 1 + sum(score >= scores[k][k] for score in others.values())
        expected[image] = ((entropy(scores[k], k) + entropy(column, k)) / 2, scores[k][k] / SCALE, rank, said)
    assert [each.loss for each in found] == sorted((each.loss for each in found), reverse=True)
    assert sorted(each.image for each in found) == [0, 1, 3, 4], "an image without a caption has no loss"
    for each in found:
        loss, cosine, rank, said = expected[each.image]
        assert each.loss == pytest.approx(loss, abs=1e-5)
        assert each.cosine == pytest.approx(cosine, abs=1e-5)
        assert (each.rank, each.said) == (rank, said)
        assert each.caption == sample.captions[sample.caption_image.tolist().index(each.image)]
    mean = sum(each.loss for each in found) / 4
    assert mean == pytest.approx(ClipLoss()(images, texts, torch.tensor(SCALE)).item(), abs=1e-5)


def test_regions() -> None:
    sample = made_up()
    found = worst_regions(sample, SCALE)
    expected = []
    for k, own in enumerate(sample.region_phrase.tolist()):
        scores = [SCALE * dot(sample.region_features[k], text) for text in sample.phrase_features]
        said = max((j for j in range(4) if j != own), key=lambda j: scores[j])
        expected.append((entropy(scores, own), k, own, said, scores))
    expected.sort(reverse=True)
    assert len(found) == 7
    for each, (loss, k, own, said, scores) in zip(found, expected, strict=True):
        assert each.loss == pytest.approx(loss, abs=1e-5)
        assert (each.image, each.phrase, each.said) == (
            int(sample.region_image[k]), sample.phrases[own], sample.phrases[said]
        )  # fmt: skip
        assert torch.equal(each.box, sample.boxes[k])
        assert each.cosine == pytest.approx(scores[own] / SCALE, abs=1e-5)
        assert each.said_cosine == pytest.approx(scores[said] / SCALE, abs=1e-5)


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_boxes(kind: str) -> None:
    sample = made_up()
    found = worst_boxes(sample, kind)
    assert [each.loss for each in found] == sorted((each.loss for each in found), reverse=True)
    assert len(found) == 6, "a phrase that occurs twice in an image is asked once"
    loss, twice = GroundingLoss(kind=kind), 0
    for each in found:
        row = sample.asked.tolist().index([each.image, sample.phrases.index(each.phrase)])
        assert torch.equal(each.predicted, sample.predicted[row])
        own = [
            k for k in range(7)
            if int(sample.region_image[k]) == each.image and sample.phrases[sample.region_phrase[k]] == each.phrase
        ]  # fmt: skip
        losses = [float(loss(each.predicted[None, None], sample.boxes[k][None, None])) for k in own]
        assert each.loss == pytest.approx(min(losses), abs=1e-6)
        assert each.iou == pytest.approx(max(iou(each.predicted, sample.boxes[k]) for k in own), abs=1e-5)
        twice += len(each.boxes) == 2
    assert twice == 1


def iou(first: Tensor, second: Tensor) -> float:
    (a, b, c, d), (e, f, g, h) = first.tolist(), second.tolist()
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)


def test_what_cannot_be_failed_at_is_left_out() -> None:
    sample = made_up()
    sample.predicted = None
    assert worst_boxes(sample, "mse") == []
    sample.captions, sample.caption_image, sample.caption_features = ["a"], torch.tensor([1]), unit(1, 8)
    (alone,) = worst_images(sample, SCALE)
    assert (alone.rank, alone.said, alone.loss) == (1, None, pytest.approx(0, abs=1e-6))


def loader(model: TrainedModel, data: Path, batch_size: int):
    sizes = {"image_size": 32, "text_length": model.text_length, "region_length": model.region_length}
    return create_loader(
        data, tokenizer=model.tokenizer, batch_size=batch_size, max_regions=16, train=False, crop=model.crop, **sizes
    )


def test_a_sample_is_what_the_model_says(tmp_path: Path) -> None:
    """Against the verbs that take files and pixel boxes, image by image."""
    model = load(save_run(tmp_path), device="cpu")
    batches = loader(model, tmp_path / "data" / "train", batch_size=2)
    sample = take_sample(model, first_batches(batches, 3), total=3, name="val")
    assert sample.keys == ["wide", "tall", "square"]
    files = [tmp_path / "data" / f"{key}.jpg" for key in sample.keys]
    torch.testing.assert_close(sample.image_features, model.encode_image(files))
    torch.testing.assert_close(sample.caption_features, model.encode_text(sample.captions))
    torch.testing.assert_close(sample.phrase_features, model.encode_phrases(sample.phrases))
    for i, batch in enumerate(loader(model, tmp_path / "data" / "train", batch_size=1)):
        own = sample.region_image == i
        assert [sample.phrases[k] for k in sample.region_phrase[own]] == batch.phrases[0]
        assert torch.equal(sample.boxes[own], batch.boxes[0][batch.region_mask[0]])
        with torch.no_grad():
            tokens = model.model.image_tokens(batch.images)
            texts = model.encode_phrases([sample.phrases[k] for k in sample.asked[sample.asked[:, 0] == i, 1]])
            predicted = model.model.ground(tokens, texts[None])[0]
            regions = model.model.encode_regions(tokens, batch.boxes, normalize=True)[0][batch.region_mask[0]]
        torch.testing.assert_close(sample.region_features[own], regions)
        torch.testing.assert_close(sample.predicted[sample.asked[:, 0] == i], predicted)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_first_samples_are_taken(tmp_path: Path, count: int) -> None:
    model = load(save_run(tmp_path), device="cpu")
    batches = list(first_batches(loader(model, tmp_path / "data" / "train", batch_size=2), count))
    assert [key for batch in batches for key in batch.keys] == ["wide", "tall", "square"][:count]
    assert all(len(batch.images) == len(batch.phrases) == len(batch.keys) for batch in batches)
