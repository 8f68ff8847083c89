from __future__ import annotations

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.evaluate.regions import classify, recognition, region_text_retrieval
from tests.peak import measurable, peak_bytes

CLASSES = ["red dot", "blue dot", "red bar", "thing"]
ATTRIBUTES = {
    "red dot": {"colour": "red", "shape": "dot"},
    "blue dot": {"colour": "blue", "shape": "dot"},
    "red bar": {"colour": "red", "shape": "bar"},
}


def test_classify_takes_the_largest_and_of_equals_the_first() -> None:
    classes = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [1, 0]])
    regions = torch.tensor([[1.0, 0], [0.5, 0.9], [0, 1], [torch.nan, 1], [0, 0]])
    for tile_elements in (1, 9, 1 << 20):
        assert classify(regions, classes, tile_elements=tile_elements).tolist() == [0, 2, 1, -1, 0]
    with pytest.raises(InputError, match="at least one class"):
        classify(regions, classes[:0])


def test_recognition_worked_case() -> None:
    labels = torch.tensor([0, 0, 0, 1, 3, -1, 2])
    predicted = torch.tensor([0, 1, 2, 1, 0, 0, -1])
    metrics = recognition(predicted, labels, CLASSES, ATTRIBUTES)
    assert metrics["recognition_top1"] == pytest.approx(2 / 6)  # the fifth ("thing") and last are wrong, -1 is left out
    assert metrics["recognition_mean_class"] == pytest.approx((1 / 3 + 1 + 0 + 0) / 4)
    # "thing" has no colour and is left out; a prediction of -1 has none either, and is wrong.
    assert metrics["recognition_colour"] == pytest.approx(3 / 5)  # right: 0->0, 0->2, 1->1
    assert metrics["recognition_shape"] == pytest.approx(3 / 5)  # right: 0->0, 0->1, 1->1
    assert list(metrics) == ["recognition_top1", "recognition_mean_class", "recognition_colour", "recognition_shape"]


def test_a_predicted_phrase_without_the_attribute_is_wrong() -> None:
    metrics = recognition(torch.tensor([3]), torch.tensor([0]), CLASSES, ATTRIBUTES)
    assert metrics["recognition_colour"] == 0


def test_recognition_without_regions_or_attributes() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert recognition(nothing, nothing, CLASSES) == {"recognition_top1": None, "recognition_mean_class": None}
    assert set(recognition(nothing, nothing, CLASSES, ATTRIBUTES).values()) == {None}


def test_region_text_retrieval_agrees_with_all_pairs() -> None:
    """Against the full regions × regions table, where a region's text is right for each region with the same text."""
    regions = torch.randn(61, 5, dtype=torch.float64)
    phrases = torch.randn(23, 5, dtype=torch.float64)
    phrase = torch.randint(23, (61,))
    metrics = region_text_retrieval(regions, phrases, phrase)
    scores = regions @ phrases[phrase].T
    same = phrase[:, None] == phrase[None, :]
    for way, table in (("r2t", scores), ("t2r", scores.T)):
        # Equal texts tie exactly, and are all right or all wrong: any order among them serves.
        order = table.argsort(1, descending=True)
        right = same.gather(1, order)
        for k in (1, 10):
            assert metrics[f"{way}_r{k}"] == pytest.approx(right[:, :k].any(1).double().mean().item())


def test_frequent_wrong_texts_fill_the_list_as_often_as_they_occur() -> None:
    regions = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 10)
    phrases = torch.tensor([[0.5, 0.0], [0.9, 0.1]])
    metrics = region_text_retrieval(regions, phrases, torch.tensor([0] + [1] * 10))
    assert metrics["r2t_r10"] == pytest.approx(10 / 11)  # ten copies of text 1 stand before region 0's own text
    assert metrics["r2t_r1"] == pytest.approx(10 / 11)


def test_no_regions() -> None:
    metrics = region_text_retrieval(torch.empty(0, 0), torch.empty(0, 0), torch.empty(0, dtype=torch.int64))
    assert metrics == dict.fromkeys(["r2t_r1", "r2t_r10", "t2r_r1", "t2r_r10"])


@pytest.mark.skipif(not measurable(), reason="this system does not report a process's peak memory")
def test_no_table_of_regions_and_texts_is_kept() -> None:
    """LVIS's number of classes: the table would be 385 MB, and its masks and ranks as much again; a tile has 17 MB, and
    about a dozen are there at a time."""
    regions, classes = torch.randn(80_000, 4), torch.randn(1203, 4)
    label = torch.randint(1203, (80_000,))
    classify(regions[:4], classes)
    assert peak_bytes(lambda: classify(regions, classes)) < 160 << 20
    assert peak_bytes(lambda: region_text_retrieval(regions, classes, label)) < 320 << 20
