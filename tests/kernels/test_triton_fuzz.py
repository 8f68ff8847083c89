"""Random problems for the Triton kernels: a few in the interpreter, many on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_in_the_interpreter() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted_fuzz", "12", "0"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    from tests.kernels import interpreted_fuzz as fuzz

    fuzz.check(range(40), dtype, "cuda")
    fuzz.check(range(40, 60), dtype, "cuda", scaled=13)
