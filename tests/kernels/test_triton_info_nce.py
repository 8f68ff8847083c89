"""InfoNCE's Triton kernels: in the interpreter (fp32, fp16), on a GPU (bf16 too)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.kernels.block import Block
from tests import dense
from tests.kernels import interpreted_info_nce as checks

pytest.importorskip("triton")
HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]


def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpreted_info_nce"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_features_on_the_cpu_are_refused() -> None:
    from cllip_fast.kernels.info_nce import triton

    x, y = dense.features(3, 16, torch.float32)
    scale = torch.tensor(1.0)
    statistics = triton.RowStatistics.start(3, scale)
    with pytest.raises(InputError, match="backend is 'triton', which runs on GPUs only, but the features are on cpu"):
        triton.forward_block(x, y, scale, Block((0, 0, 3)), statistics, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from cllip_fast.kernels.info_nce import triton, triton_tiles

    checks.check(triton, dtype, "cuda", [(1, 8), (17, 24), (123, 19), (507, 64), (1000, 512)])
    monkeypatch.setattr(triton_tiles, "PIECE_BYTES", 2**17)
    checks.check(triton, dtype, "cuda", [(507, 64)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_fused_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from cllip_fast.kernels.info_nce import triton, triton_backward

    monkeypatch.setattr(triton_backward, "FUSED_WIDTH", 1024)
    checks.check(triton, dtype, "cuda", [(17, 24), (123, 19), (507, 64), (300, 600)])


@pytest.mark.gpu
def test_edges_on_a_gpu() -> None:
    from cllip_fast.kernels.info_nce import triton

    checks.check_not_finite(triton, "cuda")
    checks.check_empty(triton, "cuda")
    checks.check_same_bits(triton, "cuda")


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    from cllip_fast.kernels.info_nce import triton

    x, y = (each.cuda() for each in dense.features(300, 64, torch.bfloat16))
    scale, block = torch.tensor(10.0, device="cuda"), Block((0, 0, 300))
    statistics = triton.RowStatistics.start(300, scale)
    outputs = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(y, dtype=torch.float32)

    def run() -> torch.Tensor:
        for each in (statistics.maximum, statistics.total, *outputs):
            each.zero_()
        top, total = triton.forward_block(x, y, scale, block, statistics, None)
        row_values, column_values = (
            torch.stack([maximum, 1 / each, torch.ones_like(each)])
            for maximum, each in ((statistics.maximum, statistics.total), (top, total))
        )
        triton.backward_block(x, y, scale, block, row_values, column_values, *outputs, None, reference=None)
        return torch.cat([each.flatten() for each in (top, total, *outputs)])

    expected = run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    assert torch.equal(found, expected)
