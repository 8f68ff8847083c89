from __future__ import annotations

import pytest
import torch

from cllip_fast.evaluate.retrieval import image_text_retrieval


def test_worked_case() -> None:
    """Two images with two captions each, and one with one; scores are the text features' own entries."""
    images = torch.eye(3)
    texts = torch.tensor([[9.0, 1, 5], [2, 8, 1], [7, 3, 2], [1, 4, 3], [0, 6, 4]])
    image_index, text_index = torch.tensor([0, 0, 1, 1, 2]), torch.arange(5)
    metrics = image_text_retrieval(images, texts, image_index, text_index)
    # Columns: image 0 ranks t0 t2 ... (found); image 1 ranks t1 t4 t3 (its t3 third); image 2 ranks t0 t4 (second).
    assert metrics["i2t_r1"] == pytest.approx(1 / 3)
    assert metrics["i2t_r5"] == 1
    # Rows: t0 -> 0 right, t1 (of image 0) -> 1 wrong, t2 (of image 1) -> 0 wrong, t3 -> 1 right, t4 (of 2) -> 1 wrong.
    assert metrics["t2i_r1"] == pytest.approx(2 / 5)
    assert metrics["t2i_r5"] == metrics["t2i_r10"] == 1


def test_agrees_with_a_loop_over_captions() -> None:
    """Every caption as a gallery row and a query of its own, identical ones included; here each image has 1 to 4."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(29, 6, generator=generator, dtype=torch.float64)
    distinct = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    owned = [torch.randint(40, (1 + i % 4,), generator=generator).tolist() for i in range(29)]
    pairs = [(i, t) for i, texts in enumerate(owned) for t in texts]
    index = torch.tensor(pairs)
    metrics = image_text_retrieval(images, distinct, index[:, 0], index[:, 1])

    scores = images @ distinct.T
    for k in (1, 5, 10):
        # Matches are put first among equals here; scores of different texts are distinct, so only matches can tie.
        found = []
        for i, texts in enumerate(owned):
            gallery = sorted(pairs, key=lambda pair: (-float(scores[i, pair[1]]), pair[1] not in texts))
            found.append(any(t in texts for _, t in gallery[:k]))
        assert metrics[f"i2t_r{k}"] == pytest.approx(sum(found) / len(found))
        found = []
        for _, t in pairs:
            gallery = sorted(range(29), key=lambda i: -float(scores[i, t]))
            found.append(any(t in owned[i] for i in gallery[:k]))
        assert metrics[f"t2i_r{k}"] == pytest.approx(sum(found) / len(found))


def test_a_collapsed_model_finds_nothing() -> None:
    metrics = image_text_retrieval(torch.ones(50, 4), torch.ones(50, 4), torch.arange(50), torch.arange(50))
    assert set(metrics.values()) == {0.0}


def test_no_images() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    metrics = image_text_retrieval(torch.empty(0, 0), torch.empty(0, 0), nothing, nothing)
    assert len(metrics) == 6
    assert set(metrics.values()) == {None}
