"""The Triton kernels of localization: right in the interpreter; on a GPU right in every type, repeatable."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cllip_fast.losses import PatchLocalizationLoss

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_localize"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=300,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("other_images", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_dense_on_a_gpu(dtype: torch.dtype, other_images: bool) -> None:
    from tests.kernels.interpreted_localize import SHAPES, check

    for shape in (*SHAPES, (7, (14, 14), 5, 512)):
        for scale in (1.0, 100.0):
            check(shape, dtype, scale, other_images, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("other_images", [False, True])
def test_same_bits_in_a_graph_without_waiting(other_images: bool) -> None:
    features = [
        each.cuda().bfloat16().requires_grad_() for each in (torch.randn(32, 196, 256), torch.randn(32, 8, 256))
    ]
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    boxes = torch.rand(32, 8, 2, 2, device="cuda").sort(2).values.flatten(2)
    loss = PatchLocalizationLoss(other_images=other_images, backend="triton")

    def step() -> list[torch.Tensor]:
        value = loss(*features, boxes, scale)
        return [value.detach(), *torch.autograd.grad(value, [*features, scale])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        first = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, captured))
