"""Random problems for the Triton kernels of InfoNCE, sigmoid loss and localization, against fp64.

TRITON_INTERPRET=1 python -m tests.kernels.interpreted_fuzz [problems] [first seed]

A block is any run of positives in any rectangle, with any masks on either side, as a rank of many may see it.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import tiles as info_nce_tiles
from cllip_fast.kernels.info_nce import triton as info_nce_triton
from cllip_fast.kernels.info_nce import triton_backward, triton_tiles
from cllip_fast.kernels.localize import tiles as localize_tiles
from cllip_fast.kernels.localize import triton as localize_triton
from cllip_fast.kernels.localize.boxes import patch_spans
from cllip_fast.kernels.sigmoid import tiles as sigmoid_tiles
from cllip_fast.kernels.sigmoid import triton as sigmoid_triton

SIZES = (1, 1, 2, 15, 16, 17, 31, 33, 40)
WIDTHS = (1, 5, 8, 32, 33, 40)
SCALES = (0.0, 1.0, 14.3, 100.0, -20.0)
THRESHOLDS = (-1.0, -0.4, 0.0, 0.3, 0.9, 0.999)


@dataclass(frozen=True)
class Problem:
    """Features [n, D], [m, D], their block, and what it is weighed with."""

    rows: Tensor
    columns: Tensor
    block: Block
    scale: float
    bias: float | None
    split: bool
    row_part: bool
    seed: int

    def double(self) -> Problem:
        texts = self.block.row_texts
        block = replace(self.block, row_texts=None if texts is None else texts.double())
        return replace(self, rows=self.rows.double(), columns=self.columns.double(), block=block)


def strided(value: Tensor, pick: random.Random) -> Tensor:
    """The same numbers, sometimes with strides of their own."""
    if pick.random() < 0.6:
        return value
    if value.dim() == 2 and pick.random() < 0.5:
        return value.t().contiguous().t()
    return torch.stack([value, value], -1)[..., 0]


def problem(seed: int, dtype: torch.dtype, device: str, scaled: int = 1) -> Problem:
    """A random one; `scaled` multiplies the sizes."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n, m = (pick.choice(SIZES) * scaled - pick.randrange(scaled) for _ in range(2))
    width = 1536 if pick.random() < 0.03 else pick.choice(WIDTHS)

    def features(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)

    rows, columns, texts = features(n), features(m), features(n)
    length = pick.randint(0, min(n, m))
    first, column = pick.randint(0, n - length), pick.randint(0, m - length)
    texts[first : first + length] = columns[column : column + length]
    if pick.random() < 0.3:  # scores far apart: tiles need two exponentials
        rows[pick.randrange(n)] *= 4
        columns[pick.randrange(m)] *= -3

    def mask(count: int) -> Tensor | None:
        share = pick.choice((None, None, 0.0, 0.3, 0.9, 1.0))
        return None if share is None else strided(torch.rand(count, generator=generator) < share, pick).to(device)

    kinds = pick.choice((None, None, 1, 3, 50))
    ids = [None, None]
    if kinds is not None:
        ids = [strided(torch.randint(kinds, (each,), generator=generator), pick).to(device) for each in (n, m)]
    threshold = pick.choice((None, None, *THRESHOLDS))
    block = Block(
        (first, column, length),
        row_valid=mask(n),
        column_valid=mask(m),
        row_ids=ids[0],
        column_ids=ids[1],
        row_texts=None if threshold is None else strided(texts.to(dtype), pick).to(device),
        threshold=1.0 if threshold is None else threshold,
    )
    rows, columns = (strided(each.to(dtype), pick).to(device) for each in (rows, columns))
    bias = pick.choice((None, -10.0, 3.0))
    masked = any(each is not None for each in (block.row_valid, block.column_valid, kinds, threshold))
    row_part = not masked and pick.random() < 0.5  # the engine asks for it where there are no masks
    return Problem(rows, columns, block, pick.choice(SCALES), bias, pick.random() < 0.2, row_part, seed)


def number(value: float, like: Tensor) -> Tensor:
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=kind, device=like.device)


def info_nce(kernel: ModuleType, p: Problem, saved: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Log-sum-exps after the block was seen twice, then gradients, for which `saved` are the log-sum-exps; in fp64."""
    scale = number(p.scale, p.rows)
    (n, _), (m, _) = p.rows.shape, p.columns.shape
    space = Workspace(n, m, scale)
    statistics = kernel.RowStatistics.start(n, scale)
    for _ in range(2):
        column_max, column_total = kernel.forward_block(p.rows, p.columns, scale, p.block, statistics, space)
    sums = {"row": (statistics.maximum, statistics.total), "column": (column_max, column_total)}
    found = {f"{name}_lse": maximum.double() + total.double().log() for name, (maximum, total) in sums.items()}
    first, _, length = p.block.positive
    found["positive"] = statistics.positive[first : first + length].double()
    values = []
    for name in sums:
        lse = (found if saved is None else saved)[f"{name}_lse"]
        known = lse > -torch.inf
        lse = lse.masked_fill(~known, 0).to(scale.dtype)
        weight = torch.linspace(0.5, 1, len(lse), device=scale.device).to(scale.dtype) * known
        values.append(torch.stack([lse, weight, weight]))
    d_rows, d_columns = (
        torch.zeros(each.shape, dtype=scale.dtype, device=scale.device) for each in (p.rows, p.columns)
    )
    row_part = scale.new_zeros(m) if p.row_part else None
    kernel.backward_block(
        *(p.rows, p.columns, scale, p.block, *values, d_rows, d_columns, space),
        reference=None,
        split=p.split,
        row_part=row_part,
    )
    found |= {"d_rows": d_rows.double(), "d_columns": d_columns.double()}
    return found if row_part is None else found | {"row_part": row_part.double()}


def check_info_nce(p: Problem) -> None:
    exact = info_nce(info_nce_tiles, p.double())
    found = info_nce(info_nce_triton, p, exact)
    size = score_bound(p)
    score_error = 4 * torch.finfo(torch.float32).eps * max(1.0, size)
    for name, value in exact.items():
        if not value.numel():
            continue
        allowed = score_error
        if name == "row_part":
            allowed = 8 * score_error * max(1.0, size) * len(p.rows)
        elif name.startswith("d_"):
            side = p.columns if name == "d_rows" else p.rows
            terms = 2 * max(1.0, side.double().abs().max().item())
            allowed = (torch.finfo(p.rows.dtype).eps + score_error) * terms * 4
        assert_close(name, found[name], value, allowed, p)


def sigmoid(kernel: ModuleType, p: Problem) -> dict[str, Tensor]:
    scale = number(p.scale, p.rows)
    bias = None if p.bias is None else number(p.bias, p.rows)
    block = replace(p.block, row_ids=None, column_ids=None, row_texts=None)  # the loss has padding only
    space = Workspace(len(p.rows), len(p.columns), scale)
    d_rows, d_columns = (
        torch.zeros(each.shape, dtype=scale.dtype, device=scale.device) for each in (p.rows, p.columns)
    )
    d_bias = torch.zeros_like(scale)
    sides = p.rows, p.columns, scale, bias, block
    loss = kernel.forward_block(*sides, space)
    again = kernel.backward_block(*sides, d_rows, d_columns, d_bias, space)
    found = {"loss": loss, "loss of backward": again, "d_rows": d_rows, "d_columns": d_columns, "d_bias": d_bias}
    return {name: value.double() for name, value in found.items()}


def check_sigmoid(p: Problem) -> None:
    exact, found = sigmoid(sigmoid_tiles, p.double()), sigmoid(sigmoid_triton, p)
    score_error = 4 * torch.finfo(torch.float32).eps * max(1.0, score_bound(p), abs(p.bias or 0))
    pairs = len(p.rows) * len(p.columns)
    for name, value in exact.items():
        allowed = score_error * max(1.0, pairs**0.5, value.abs().max().item())
        if name in ("d_rows", "d_columns"):
            terms = len(p.columns if name == "d_rows" else p.rows)
            side = (p.columns if name == "d_rows" else p.rows).double().abs().max().item()
            allowed = 2 * (torch.finfo(p.rows.dtype).eps + score_error) * max(1.0, side) * terms**0.5 * 2
        assert_close(name, found[name], value, allowed, p)


def score_bound(p: Problem) -> float:
    """Of the absolute values of all scores."""
    return abs(p.scale) * (p.rows.double().norm(dim=1).max() * p.columns.double().norm(dim=1).max()).item()


def assert_close(name: str, found: Tensor, exact: Tensor, allowed: float, p: Problem) -> None:
    same = found == exact  # infinities
    error = torch.where(same, 0, (found - exact).abs())
    worst = error.max().item()
    about = {"seed": p.seed, "sizes": (*p.rows.shape, len(p.columns)), "scale": p.scale, "block": p.block.positive}
    assert worst <= allowed, (name, worst, allowed, str(p.rows.dtype), about)


def check_localize(seed: int, dtype: torch.dtype, device: str) -> None:
    """A batch of images, boxes of every shape, any other images excluded."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images, each, width = pick.choice((1, 2, 3, 5)), pick.choice((1, 2, 5, 17, 33)), pick.choice(WIDTHS)
    grid = pick.choice((1, 2, 5)), pick.choice((1, 3, 9, 17))

    def features(count: int) -> Tensor:
        values = torch.randn(images, count, width, generator=generator, dtype=torch.float64)
        values = F.normalize(values, dim=-1).to(dtype).to(device)
        return values if pick.random() < 0.6 else values.transpose(1, 2).contiguous().transpose(1, 2)

    patches, texts = features(grid[0] * grid[1]), features(each)
    corners = torch.rand(images, each, 2, 2, generator=generator).sort(2).values
    corners[0] = torch.tensor([[0.0, 0.0], [1.0, 1.0]]) if pick.random() < 0.3 else corners[0]  # nothing is outside
    spans = patch_spans(corners.flatten(2), grid).to(device)
    share = pick.choice((None, 0.0, 0.5, 1.0))
    excluded = None if share is None else strided(torch.rand(images, images * each, generator=generator) < share, pick)
    excluded = excluded if excluded is None else excluded.to(device)
    pull = (torch.rand(images, each, generator=generator).double() * (torch.rand(images, each) < 0.8)).to(device)
    size = pick.choice(SCALES)

    def run(kernel: ModuleType, patches: Tensor, texts: Tensor, saved: list[Tensor] | None = None) -> list[Tensor]:
        scale = number(size, patches)
        known = patches, texts, scale, spans, grid, excluded
        sums = kernel.log_sums(*known)
        weights = (value.to(scale.dtype) for value in (*(saved or sums)[:2], pull))
        added = [torch.zeros(value.shape, dtype=scale.dtype, device=device) for value in (patches, texts)]
        return [value.double() for value in (*sums, *added, kernel.backward(*known, *weights, *added))]

    exact = run(localize_tiles, patches.double(), texts.double())
    for name, value, ours in zip(
        ("inside", "outside", "d_patches", "d_texts", "total"),
        exact,
        run(localize_triton, patches, texts, exact),
        strict=True,
    ):
        score_error = 4 * torch.finfo(torch.float32).eps * max(1.0, abs(size))
        terms = 0.0 if name in ("inside", "outside") else pull.numel() ** 0.5 * max(1.0, value.abs().max().item())
        allowed = 4 * score_error if not terms else 4 * terms * (score_error + torch.finfo(dtype).eps)
        worst = torch.where(ours == value, 0, (ours - value).abs()).max().item()
        assert worst <= allowed, (name, worst, allowed, dtype, seed)


def check(seeds: range, dtype: torch.dtype, device: str, scaled: int = 1) -> None:
    for seed in seeds:
        p = problem(seed, dtype, device, scaled)
        check_info_nce(p)
        check_sigmoid(p)
        check_localize(seed, dtype, device)


def main() -> None:
    torch.set_num_threads(1)
    count, first = (int(each) for each in (sys.argv[1:] + ["40", "0"][len(sys.argv) - 1 :]))
    half = count // 2
    check(range(first, first + half), torch.float32, "cpu")
    triton_tiles.PIECE_BYTES = 2048  # several pieces
    localize_triton.PROGRAMS = 2  # several images a program
    check(range(first + half, first + 3 * half // 2), torch.float16, "cpu")
    triton_backward.FUSED_WIDTH = 64
    check(range(first + 3 * half // 2, first + count), torch.float32, "cpu")


if __name__ == "__main__":
    main()
