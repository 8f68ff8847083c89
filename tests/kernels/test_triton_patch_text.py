"""The Triton kernels of patch–text, in Triton's interpreter and on a GPU; `test_triton_budget` compiles them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from cllip_fast.kernels.patch_text import tiles, triton_backward, triton_forward
from cllip_fast.kernels.patch_text.triton_operands import FULL, HALF, UNALIGNED, kind_of
from cllip_fast.kernels.tuning import LARGE
from cllip_fast.streaming.backends import kernels
from tests.kernels import triton_patch_text_checks as checks

TYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1, 1, 1), (3, 17, 123, 40), (5, 196, 507, 64), (2, 300, 130, 512), (2, 49, 33, 768), (1, 576, 17, 1536)]


def test_in_the_interpreter() -> None:
    """A process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-W", "ignore", "-m", checks.__name__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("patches", "covered"), [(49, 64), (196, 256), (256, 256), (576, 640), (729, 768)])
def test_the_tile_leaves_few_patches_over(patches: int, covered: int) -> None:
    features = torch.empty(1, patches, 8, dtype=torch.float16), torch.empty(1, 8, dtype=torch.float16)
    for table in (triton_forward.TILES, triton_backward.TILES):
        for capability in (80, 90, 100):
            tile = table.row(capability, LARGE, kind_of(*features))
            assert -(-patches // tile.patches) * tile.patches == covered


def test_the_kind_of_tile() -> None:
    """By type, by what TMA can load, by the number of patches."""
    patches, texts = torch.empty(2, 196, 16, dtype=torch.float16), torch.empty(3, 16, dtype=torch.float16)
    assert kind_of(patches, texts) == HALF[0]
    assert kind_of(patches[:, :49], texts) == HALF[2]
    assert kind_of(patches, texts[:, 1:9]) == UNALIGNED  # address
    assert kind_of(patches[..., :9].contiguous(), texts[:, :9]) == UNALIGNED  # stride
    assert kind_of(patches[:1].expand(2, -1, -1), texts) == UNALIGNED  # repeated
    assert kind_of(patches.float(), texts.float()) == FULL


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_kernels(shape: tuple[int, int, int, int], dtype: torch.dtype, masked: bool) -> None:
    checks.check_max(shape, dtype, "cuda", masked)
    checks.check_softmax(shape, dtype, "cuda", masked, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", ["max", "softmax"])
def test_contrast(shape: tuple[int, int, int, int], dtype: torch.dtype, pool: str) -> None:
    for filtered in (False, True):
        checks.check_contrast(shape, 3, pool, 20.0, "cuda", dtype, filtered=filtered)
    checks.check_contrast(shape, 20, pool, 100.0, "cuda", dtype, masked=False)


@pytest.mark.gpu
def test_extremes_and_layouts() -> None:
    checks.check_extremes("cuda")
    checks.check_layouts("cuda")
    checks.check_nothing("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("pool", ["max", "softmax"])
def test_loss(pool: str, scale: float, dtype: torch.dtype) -> None:
    checks.check_loss(pool, scale, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("pool", ["max", "softmax"])
def test_nothing_waits_for_the_device(pool: str) -> None:
    v = checks.pairs((4, 50, 70, 64), torch.bfloat16, "cuda", True)
    checks.backward(v, pool, 0.1, *checks.forward(v, pool))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        checks.backward(v, pool, 0.1, *checks.forward(v, pool))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_is_plain_pytorch_on_a_gpu() -> None:
    """Until the `gpu` tests have passed on one; see `streaming/backends.py`."""
    assert kernels("auto", "patch_text", torch.device("cuda")) is tiles
