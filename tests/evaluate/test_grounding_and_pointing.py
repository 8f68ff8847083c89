from __future__ import annotations

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.evaluate.grounding import best_iou, grounding_metrics
from cllip_fast.evaluate.pointing import hits, peak_points, pointing_metrics


def raster_iou(a: list[int], b: list[int]) -> float:
    """By counting cells of a grid."""
    cells = [
        {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}  # empty when the corners are swapped
        for box in (a, b)
    ]
    union = cells[0] | cells[1]
    return len(cells[0] & cells[1]) / len(union) if union else 0.0


def test_best_iou_agrees_with_counting_cells() -> None:
    predicted = torch.randint(0, 12, (17, 4))
    predicted[:12] = torch.cat(
        [predicted[:12, :2].minimum(predicted[:12, 2:]), predicted[:12].reshape(12, 2, 2).amax(1)], 1
    )
    corner = torch.randint(0, 8, (40, 2))
    boxes = torch.cat([corner, corner + torch.randint(1, 5, (40, 2))], 1)
    query = torch.cat([torch.arange(17), torch.randint(17, (23,))])
    iou = best_iou(predicted.double() / 12, boxes.double() / 12, query)
    for q in range(17):
        own = [raster_iou(predicted[q].tolist(), box) for box in boxes[query == q].tolist()]
        assert iou[q].item() == pytest.approx(max(own), abs=1e-6)


def test_a_nan_box_fits_nothing() -> None:
    box = torch.tensor([[0.0, 0, 1, 1]])
    assert best_iou(box * torch.nan, box, torch.tensor([0])).tolist() == [0]


def test_grounding_metrics() -> None:
    metrics = grounding_metrics(torch.tensor([0.5, 0.4999, 1.0, 0.0]), torch.tensor([0.2, 0.7]))
    assert metrics["grounding_acc50"] == metrics["referring_acc50"] == 0.5
    assert metrics["grounding_iou"] == pytest.approx(1.9999 / 4)
    assert metrics["referring_iou"] == pytest.approx(0.45)
    nothing = dict.fromkeys(metrics)
    assert grounding_metrics(None, None) == grounding_metrics(torch.empty(0), torch.empty(0)) == nothing


def test_peak_points_of_an_oblong_grid() -> None:
    maps = torch.zeros(3, 6)
    maps[0, 4] = maps[1, 2] = 1
    points = peak_points(maps, (2, 3))
    torch.testing.assert_close(points, torch.tensor([[0.5, 0.75], [5 / 6, 0.25], [1 / 6, 0.25]]))  # ties: the first
    with pytest.raises(InputError, match="6 patches"):
        peak_points(maps, (2, 4))


def test_hits_any_box_of_the_phrase_and_borders_count() -> None:
    points = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    boxes = torch.tensor([[0.0, 0, 0.4, 0.4], [0.5, 0.5, 1, 1], [0, 0, 1, 0.7], [0.8, 0.0, 0.9, 0.1]])
    hit = hits(points, boxes, torch.tensor([0, 0, 1, 2]))
    assert hit.tolist() == [True, False, True]
    assert pointing_metrics(hit) == {"pointing": pytest.approx(2 / 3)}
    assert pointing_metrics(hit[:0]) == {"pointing": None}


def test_a_map_that_is_not_finite_misses() -> None:
    points = peak_points(torch.tensor([[torch.nan, 1.0]]), (1, 2))
    assert hits(points, torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0])).tolist() == [False]
