"""The sigmoid loss's Triton kernels: in the interpreter (fp32, fp16), on a GPU (bf16 too)."""

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
from tests.kernels import interpreted_sigmoid as checks

pytest.importorskip("triton")


def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpreted_sigmoid"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_features_on_the_cpu_are_refused() -> None:
    from cllip_fast.kernels.sigmoid import triton

    x, y = dense.features(3, 16, torch.float32)
    with pytest.raises(InputError, match="backend is 'triton', which runs on GPUs only, but the features are on cpu"):
        triton.forward_block(x, y, torch.tensor(1.0), None, Block((0, 0, 3)), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from cllip_fast.kernels.info_nce import triton_tiles
    from cllip_fast.kernels.sigmoid import triton

    checks.check(triton, dtype, "cuda", [(1, 8), (17, 24), (507, 512), (123, 19)])
    monkeypatch.setattr(triton_tiles, "PIECE_BYTES", 2**17)
    checks.check(triton, dtype, "cuda", [(507, 64)])


@pytest.mark.gpu
def test_edges_on_a_gpu() -> None:
    from cllip_fast.kernels.sigmoid import triton

    checks.check_small_losses(triton, "cuda")
    checks.check_edges(triton, "cuda")


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    from cllip_fast.kernels.sigmoid import triton

    x, y = (each.cuda() for each in dense.features(300, 64, torch.bfloat16))
    scale, bias = torch.tensor(10.0, device="cuda"), torch.tensor(-3.0, device="cuda")
    outputs = (
        torch.zeros_like(x, dtype=torch.float32),
        torch.zeros_like(y, dtype=torch.float32),
        torch.zeros_like(scale),
    )

    def run() -> torch.Tensor:
        return triton.backward_block(x, y, scale, bias, Block((0, 0, 300)), *outputs, None)

    expected = run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    for each in outputs:
        each.zero_()
    graph.replay()
    assert torch.equal(loss, expected)
    assert all(each.any() for each in outputs)
