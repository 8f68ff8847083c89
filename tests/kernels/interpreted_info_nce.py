"""InfoNCE's Triton kernels in Triton's interpreter, against fp64; a process of its own runs this module.

It is imported by the GPU tests too, which run the same checks on a device and in bf16.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.info_nce import tiles
from tests import dense


def walk(
    kernel: ModuleType,
    x: Tensor,
    y: Tensor,
    size: float,
    masks: dict[str, Tensor | float],
    *,
    split: bool = False,
    want_part: bool = False,
    chunks: int = 2,
) -> dict[str, Tensor]:
    """Statistics and gradients of chunk after chunk of `y`, whose texts are positives of the rows of `x`; in fp64.

    masks: "valid" [n], "ids" [n], "threshold".
    """
    n, device = len(x), x.device
    type_ = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(size, dtype=type_, device=device)
    valid, ids, threshold = (masks.get(each) for each in ("valid", "ids", "threshold"))
    statistics = kernel.RowStatistics.start(n, scale)
    height = -(-n // chunks)
    spans = [slice(start, min(n, start + height)) for start in range(0, n, height)]
    space = Workspace(n, height, scale)

    def block(span: slice) -> Block:
        return Block(
            (span.start, 0, span.stop - span.start),
            row_valid=valid,
            column_valid=None if valid is None else valid[span],
            row_ids=ids,
            column_ids=None if ids is None else ids[span],
            row_texts=None if threshold is None else y,
            threshold=threshold or 1.0,
        )

    found = [kernel.forward_block(x, y[span], scale, block(span), statistics, space) for span in spans]
    column_max, column_total = (torch.cat(each) for each in zip(*found, strict=True))
    keep = torch.ones(n, dtype=torch.bool, device=device) if valid is None else valid
    weights = torch.linspace(0.5, 1, n, device=device).to(type_) * keep
    row_values, column_values = (
        torch.stack([maximum.masked_fill(total == 0, 0), weights / total.masked_fill(total == 0, 1), weights])
        for maximum, total in ((statistics.maximum, statistics.total), (column_max, column_total))
    )
    d_rows, d_columns = torch.zeros_like(x, dtype=type_), torch.zeros_like(y, dtype=type_)
    row_part = torch.zeros(n, dtype=type_, device=device)
    for span in spans:
        kernel.backward_block(
            x,
            y[span],
            scale,
            block(span),
            row_values,
            column_values[:, span],
            d_rows,
            d_columns[span],
            space,
            reference=None,
            split=split,
            row_part=row_part[span] if want_part else None,
        )
    lse = [
        (maximum.double() + total.double().log())[keep]
        for maximum, total in ((statistics.maximum, statistics.total), (column_max, column_total))
    ]
    positive = statistics.positive.double()[keep]
    result = {"row_lse": lse[0], "column_lse": lse[1], "positive": positive}
    return result | {"d_rows": d_rows.double(), "d_columns": d_columns.double(), "row_part": row_part.double()}


def compare(
    kernel: ModuleType, x: Tensor, y: Tensor, size: float, masks: dict[str, Tensor | float], **options: bool
) -> None:
    """Fails unless errors against fp64 are those of scores and exponentials in fp32 and of G in the inputs' type."""
    have = walk(kernel, x, y, size, masks, **options)
    want = walk(tiles, x.double(), y.double(), size, masks, **options)
    eps = torch.finfo(torch.float32).eps
    wide = want["row_lse"].abs().max().item() if len(want["row_lse"]) else 1.0
    score_error = eps * max(4.0, 4 * size, 4 * wide)
    rounding = torch.finfo(x.dtype).eps + score_error
    for name, exact in want.items():
        error = (have[name] - exact).abs().max().item() if exact.numel() else 0.0
        if name in ("row_lse", "column_lse", "positive"):
            allowed = score_error
        elif name == "row_part":
            allowed = 4 * score_error * max(1.0, size) * len(x) ** 0.5
        else:
            allowed = 2 * rounding * max(0.25, exact.abs().max().item())
        assert error <= allowed, (name, tuple(x.shape), x.dtype, size, options, error, allowed)


def masks_of(y: Tensor) -> dict[str, Tensor | float]:
    """Every kind of exclusion; texts get near-duplicates."""
    n = len(y)
    y[n - n // 3 :] = y[: n // 3].clone()
    index = torch.arange(n, device=y.device)
    return {"valid": index % 7 != 3, "ids": index % (n // 2 + 1), "threshold": 0.9}


def adversarial(y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of rows 1, 3 and of columns 2, 5 lie far from all others: two exponentials are needed."""
    x = y.clone()
    x[1 % len(x)] *= -1
    y = y.clone()
    y[2 % len(y)] *= -1
    y[5 % len(y)] = 0
    x[3 % len(x)] *= 4
    return x, y


def check(kernel: ModuleType, dtype: torch.dtype, device: str, sizes: list[tuple[int, int]]) -> None:
    """Values and gradients without and with masks; of the last size also scales, adversarial rows, parts apart."""
    for n, width in sizes:
        x, y = (each.to(device) for each in dense.features(n, width, dtype))
        masked = y.clone()
        masks = masks_of(masked)
        compare(kernel, x, y, 14.3, {})
        compare(kernel, x, masked, 30.0, masks)
    for name, mask in masks.items():
        compare(kernel, x, masked, 30.0, {name: mask})
    for size in (1.0, 100.0):
        compare(kernel, x, y, size, {})
    alike = torch.nn.functional.normalize(torch.ones(n, width, device=device) + 0.1 * x.float(), dim=1).to(dtype)
    compare(kernel, *adversarial(alike), 100.0, {})
    compare(kernel, x, y, 20.0, {}, split=True)
    compare(kernel, x, y, 20.0, {}, want_part=True)


def check_not_finite(kernel: ModuleType, device: str) -> None:
    """NaN comes through."""
    x, y = (each.to(device) for each in dense.features(17, 24, torch.float32))
    x[3, 5] = float("nan")
    result = walk(kernel, x, y, 10.0, {})
    assert result["row_lse"].isnan().nonzero().flatten().tolist() == [3]
    assert result["column_lse"].isnan().all()


def check_empty(kernel: ModuleType, device: str) -> None:
    """No rows, no columns, no valid pair."""
    x, y = (each.to(device) for each in dense.features(17, 24, torch.float32))
    scale = torch.tensor(10.0, device=device)
    for rows, columns in ((x[:0], y), (x, y[:0]), (x[:0], y[:0])):
        statistics = kernel.RowStatistics.start(len(rows), scale)
        top, total = kernel.forward_block(rows, columns, scale, Block((0, 0, 0)), statistics, None)
        assert total.tolist() == [0.0] * len(columns)
        assert statistics.total.tolist() == [0.0] * len(rows)
        assert len(top) == len(columns)
        values = torch.zeros(3, len(rows), device=device), torch.zeros(3, len(columns), device=device)
        outputs = torch.zeros_like(rows), torch.zeros_like(columns)
        kernel.backward_block(rows, columns, scale, Block((0, 0, 0)), *values, *outputs, None, reference=None)
    nothing = {"valid": torch.zeros(17, dtype=torch.bool, device=device)}
    result = walk(kernel, x, y, 10.0, nothing)
    assert not result["d_rows"].any()
    assert not result["d_columns"].any()


def check_same_bits(kernel: ModuleType, device: str) -> None:
    x, y = (each.to(device) for each in dense.features(45, 24, torch.float32))
    first, second = (walk(kernel, x, y, 30.0, {}) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def main() -> None:
    from cllip_fast.kernels.info_nce import triton, triton_backward, triton_tiles

    torch.set_num_threads(1)
    check(triton, torch.float32, "cpu", [(1, 8), (45, 40)])
    triton_tiles.PIECE_BYTES = 2048
    check(triton, torch.float16, "cpu", [(45, 24)])
    triton_backward.FUSED_WIDTH = 256
    check(triton, torch.float16, "cpu", [(17, 24)])
    check(triton, torch.float32, "cpu", [(33, 19)])
    check_not_finite(triton, "cpu")
    check_empty(triton, "cpu")
    check_same_bits(triton, "cpu")


if __name__ == "__main__":
    main()
