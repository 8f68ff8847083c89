"""The sigmoid loss's Triton kernels in Triton's interpreter, against fp64; a process of its own runs this module.

It is imported by the GPU tests too, which run the same checks on a device and in bf16.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.sigmoid import tiles
from tests import dense


def walk(
    kernel: ModuleType, x: Tensor, y: Tensor, size: float, offset: float | None, valid: Tensor | None
) -> dict[str, Tensor]:
    """Loss and gradients of two chunks of `y`, whose texts are positives of the rows of `x`; in fp64."""
    n, device = len(x), x.device
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(size, dtype=kind, device=device)
    bias = None if offset is None else torch.tensor(offset, dtype=kind, device=device)
    d_rows, d_columns = torch.zeros_like(x, dtype=kind), torch.zeros_like(y, dtype=kind)
    d_bias = torch.zeros((), dtype=kind, device=device)
    height = -(-n // 2)
    space = Workspace(n, height, scale)
    losses = torch.zeros(2, dtype=kind, device=device)
    for start in range(0, n, height):
        span = slice(start, min(n, start + height))
        of_columns = None if valid is None else valid[span]
        block = Block((start, 0, span.stop - start), row_valid=valid, column_valid=of_columns)
        losses[0] += kernel.forward_block(x, y[span], scale, bias, block, space)
        losses[1] += kernel.backward_block(x, y[span], scale, bias, block, d_rows, d_columns[span], d_bias, space)
    found = {"loss": losses[0], "loss of backward": losses[1], "d_rows": d_rows, "d_columns": d_columns}
    return {name: value.double() for name, value in (found | {"d_bias": d_bias}).items()}


def compare(
    kernel: ModuleType, x: Tensor, y: Tensor, size: float, offset: float | None, valid: Tensor | None = None
) -> None:
    """Fails unless the errors against fp64 are those of scores in fp32 and of the gradient tile in the inputs' type."""
    have, want = walk(kernel, x, y, size, offset, valid), walk(tiles, x.double(), y.double(), size, offset, valid)
    score_error = torch.finfo(torch.float32).eps * max(4.0, 4 * size, abs(offset or 0))
    rounding = torch.finfo(x.dtype).eps + score_error
    for name, exact in want.items():
        error = (have[name] - exact).abs().max().item()
        relative = rounding if name in ("d_rows", "d_columns") else score_error
        allowed = 2 * relative * exact.abs().max().item()
        if name == "d_bias":
            allowed = score_error * max(1.0, want["loss"].item())
        assert error <= allowed, (name, tuple(x.shape), x.dtype, size, offset, error, allowed)


def check(kernel: ModuleType, dtype: torch.dtype, device: str, sizes: list[tuple[int, int]]) -> None:
    """Values and gradients: sizes, scales, biases, padding."""
    for n, width in sizes:
        x, y = (each.to(device) for each in dense.features(n, width, dtype))
        for size, offset in ((1.0, None), (10.0, -10.0), (100.0, 5.0)):
            compare(kernel, x, y, size, offset)
        compare(kernel, x, y, 10.0, -3.0, torch.arange(n, device=device) % 7 != 3)


def check_small_losses(kernel: ModuleType, device: str) -> None:
    """Pairs whose loss is e^−12: 1 + e^−12 in fp32 would be wrong by a percent."""
    x, y = (each.to(device) for each in dense.features(17, 24, torch.float32))
    scale, bias = torch.tensor(1e-3, device=device), torch.tensor(-12.0, device=device)
    loss = kernel.forward_block(x, y, scale, bias, Block((0, 0, 0)), None)
    exact = torch.nn.functional.softplus(1e-3 * x.double() @ y.double().t() - 12).sum()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def check_edges(kernel: ModuleType, device: str) -> None:
    """Nothing wanted, nothing there, nothing valid; NaN comes through; the same bits again."""
    x, y = (each.to(device) for each in dense.features(33, 24, torch.float32))
    scale, none = torch.tensor(10.0, device=device), torch.zeros(0, device=device)
    for rows, columns in ((x, y), (x[:0], y), (x, y[:0])):
        loss = kernel.forward_block(rows, columns, scale, None, Block((0, 0, 0)), None)
        again = kernel.backward_block(rows, columns, scale, None, Block((0, 0, 0)), none, none, none, None)
        assert torch.equal(loss, again)
        assert bool(loss == 0) == (not len(rows) or not len(columns))
    nothing = walk(kernel, x, y, 10.0, None, torch.zeros(33, dtype=torch.bool, device=device))
    assert not any(value.any() for value in nothing.values())
    first, second = (walk(kernel, x, y, 10.0, -1.0, None) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    x[3, 5] = float("nan")
    result = walk(kernel, x, y, 10.0, None, None)
    assert result["loss"].isnan()
    assert result["loss of backward"].isnan()
    assert result["d_rows"].isnan().any(1).nonzero().flatten().tolist() == [3]


def main() -> None:
    from cllip_fast.kernels.info_nce import triton_tiles
    from cllip_fast.kernels.sigmoid import triton

    torch.set_num_threads(1)
    check(triton, torch.float32, "cpu", [(1, 8), (17, 24)])
    check(triton, torch.float16, "cpu", [(17, 19), (45, 40)])
    triton_tiles.PIECE_BYTES = 4096
    check(triton, torch.float32, "cpu", [(123, 19)])
    check_small_losses(triton, "cpu")
    check_edges(triton, "cpu")


if __name__ == "__main__":
    main()
