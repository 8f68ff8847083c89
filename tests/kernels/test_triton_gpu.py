"""The Triton operations on a GPU through their public losses; what of it needs no GPU runs on a CPU in plain PyTorch.

Kernel by kernel they are tested beside this file, in the interpreter and on a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cllip_fast.kernels.info_nce import tiles as info_nce_tiles
from cllip_fast.kernels.sigmoid import tiles as sigmoid_tiles
from tests import dense, dense_local
from tests.kernels import device_checks as checks

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATCH_OPERATIONS = ["patch_text max", "patch_text softmax", "localize"]

triton = pytest.mark.usefixtures("_triton")


@pytest.fixture
def _triton() -> None:
    pytest.importorskip("triton")


@pytest.fixture
def many_bytes() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * 2**30:
        pytest.skip(f"needs 60 GiB of the GPU's memory, {free / 2**30:.0f} GiB are free")


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_as_good_as_plain(operation: str, scale: float, dtype: torch.dtype) -> None:
    checks.check_error_rule(operation, scale, dtype, "cuda", "triton")


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_each_gradient_alone(operation: str) -> None:
    checks.check_each_gradient_alone(operation, torch.bfloat16, "cuda", "triton")


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_in_a_graph(operation: str) -> None:
    checks.check_in_a_graph(operation, torch.bfloat16, "triton")


@pytest.mark.gpu
@triton
@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_on_a_side_stream(operation: str) -> None:
    checks.check_on_a_side_stream(operation, torch.bfloat16, "triton")


@pytest.mark.gpu
@triton
@pytest.mark.usefixtures("many_bytes")
@pytest.mark.parametrize(("run", "name"), [(checks.info_nce_of, "info_nce"), (checks.sigmoid_of, "sigmoid")])
def test_more_than_2_31_features(run, name: str) -> None:
    from cllip_fast.kernels.info_nce import triton as info_nce
    from cllip_fast.kernels.sigmoid import triton as sigmoid

    kernel, plain = {"info_nce": (info_nce, info_nce_tiles), "sigmoid": (sigmoid, sigmoid_tiles)}[name]
    checks.check_block_border(run, kernel, plain, 2**21 + 513, 1024, "cuda")


@pytest.mark.gpu
@triton
@pytest.mark.usefixtures("many_bytes")
@pytest.mark.parametrize("operation", PATCH_OPERATIONS)
def test_more_than_2_31_numbers_of_patches(operation: str) -> None:
    images = 2**31 // (15 * 4096) + 7
    checks.check_patch_border(operation, images, 4096, "cuda", "triton")


@pytest.mark.gpu
@pytest.mark.slow
@triton
@pytest.mark.parametrize("operation", ["info_nce", "sigmoid", "patch_text", "localize"])
def test_memory_is_accessed_as_allocated(operation: str) -> None:
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin", Path("/usr/local/cuda/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin nor in /usr/local/cuda/bin")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", checks.__name__, operation]
    # PyTorch's own cache would hide what lies beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_the_checks_on_a_cpu(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, but for what only a GPU has."""
    monkeypatch.setattr(checks, "SIZES", [(1, 8), (17, 33)])
    for dtype, scale in ((torch.float32, 1.0), (torch.float32, 100.0), (torch.bfloat16, 14.3)):
        checks.check_error_rule(operation, scale, dtype, "cpu", "torch")
    checks.check_each_gradient_alone(operation, torch.float32, "cpu", "torch")


def test_the_border_checks_on_a_cpu() -> None:
    checks.check_block_border(checks.info_nce_of, info_nce_tiles, info_nce_tiles, 200, 12, "cpu")
    checks.check_block_border(checks.sigmoid_of, sigmoid_tiles, sigmoid_tiles, 200, 12, "cpu")
    for operation in PATCH_OPERATIONS:
        checks.check_patch_border(operation, 30, 12, "cpu", "torch")


@pytest.mark.parametrize("operation", PATCH_OPERATIONS)
def test_the_vectorised_references(operation: str) -> None:
    patches, texts, boxes = checks.local_features(9, 12, torch.float64)
    inputs = [patches, texts, torch.tensor(14.3, dtype=torch.float64)]
    mask = torch.ones(texts.shape[:2], dtype=torch.bool)
    found = dense.value_and_gradients(
        checks.OPERATIONS[operation](9, 12, 14.3, torch.float64, "cpu", "torch").dense, inputs
    )
    if operation == "localize":
        literal = lambda v, t, a: dense_local.localization(v, t, boxes, a, mask, checks.PATCHES)  # noqa: E731
    else:
        literal = partial(dense_local.patch_text, mask=mask, pool=operation.removeprefix("patch_text "))
    torch.testing.assert_close(found, dense.value_and_gradients(literal, inputs))
