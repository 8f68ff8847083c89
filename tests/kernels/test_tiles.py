"""Blocks and tiles on their own: which pairs are excluded, where positives lie, running statistics of partial walks."""

from __future__ import annotations

import pytest
import torch

from cllip_fast.kernels.block import Block, Workspace, lengths
from cllip_fast.kernels.info_nce import tiles
from cllip_fast.kernels.products import accumulation_dtype, operand, scores
from tests import dense


def test_positives_of_a_block() -> None:
    block = Block(positive=(3, 5, 4))  # rows 3..6 with columns 5..8
    tile = torch.arange(60.0).view(6, 10)  # rows 2..7
    assert block.diagonal(tile, 2).tolist() == [15.0, 26.0, 37.0, 48.0]
    assert block.rows_of(2, 8) == slice(3, 7)
    assert block.diagonal(tile[:2], 5).tolist() == [7.0, 18.0]
    assert block.rows_of(5, 7) == slice(5, 7)
    assert block.diagonal(tile, 7) is None
    assert block.diagonal(tile[:3], 0) is None
    assert Block(positive=(3, 5, 0)).diagonal(tile, 2) is None
    span = block.rows_of(0, 3)
    assert span.start == span.stop


def test_excluded_pairs_of_a_tile() -> None:
    texts = torch.tensor([[1.0, 0], [0.95, 0.31], [0, 1], [-1, 0], [2.0, 0.1]])
    columns = texts[1:4]
    block = Block(
        positive=(1, 0, 3),
        row_valid=torch.tensor([True, True, True, True, False]),
        column_valid=torch.tensor([True, True, False]),
        row_ids=torch.tensor([0, 1, 2, 3, 4]),
        column_ids=torch.tensor([1, 0, 3]),
        row_texts=texts,
        threshold=0.9,
    )
    space = Workspace(5, 3, texts)
    tile = torch.zeros(3, 3)
    block.exclude(tile, 0, columns, space)
    #  row 0: close to text 1 (cosine 0.95), id equals column 1's; row 1: its positive stays; column 2 is padding
    assert tile.isinf().tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]
    tile = torch.zeros(2, 3)
    block.exclude(tile, 3, columns, space)
    assert tile.isinf().tolist() == [[0, 0, 1], [1, 1, 1]]
    assert Block(positive=(0, 0, 3)).excluded(0, 3, columns) is None


def test_workspace_covers_all_rows_in_bounded_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 64)
    space = Workspace(17, 10, torch.zeros(0, dtype=torch.float64))
    assert list(space.spans(17)) == [(0, 6), (6, 12), (12, 17)]
    assert space.tile(0, 6, 10).data_ptr() == space.tile(0, 5, 3).data_ptr()
    assert space.tile(1, 6, 10).dtype == torch.float64
    assert list(Workspace(3, 1000, torch.zeros(0)).spans(3)) == [(0, 1), (1, 2), (2, 3)]


def test_lengths() -> None:
    texts = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert lengths(texts).tolist() == [5.0, pytest.approx(1e-12)]
    assert lengths(texts.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("size", [1.0, 59.0, 61.0, 500.0])
def test_running_statistics_of_any_scores(size: float) -> None:
    """Blocks of growing and shrinking scores, positive and negative, with a row that has only excluded pairs so far."""
    rows, columns = (each * size**0.5 for each in dense.features(7, 5))
    columns = torch.cat([columns * factor for factor in (0.01, 1.0, -1.0, 0.1)])
    valid = torch.ones(28, dtype=torch.bool)
    valid[:7] = False
    one = torch.ones((), dtype=torch.float64)
    statistics = tiles.RowStatistics.start(7, one)
    column_lse = []
    for start in range(0, 28, 4):
        part = slice(start, start + 4)
        block = Block(positive=(0, 0, 0), column_valid=valid[part])
        top, total = tiles.forward_block(rows, columns[part], one, block, statistics, Workspace(7, 4, one))
        column_lse.append(top + total.log())
    logits = (rows @ columns.t()).masked_fill(~valid, float("-inf"))
    torch.testing.assert_close(statistics.maximum + statistics.total.log(), logits.logsumexp(1))
    torch.testing.assert_close(torch.cat(column_lse)[7:], logits.logsumexp(0)[7:])
    assert statistics.shared == (logits[:, 7:].abs().max() <= tiles.SHARED_LIMIT)


def test_products_accumulate_in_fp32() -> None:
    assert accumulation_dtype(torch.float64) == torch.float64
    assert accumulation_dtype(torch.bfloat16) == torch.float32
    x, y = dense.features(9, 64, torch.bfloat16)
    out = scores(operand(x), operand(y), torch.tensor(100.0), torch.empty(9, 9))
    torch.testing.assert_close(out, 100 * x.float() @ y.float().t())
