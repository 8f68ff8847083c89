"""PatchTextLoss, forward and backward, against the same loss written with one einsum.

    pytest benchmarks/test_patch_text.py --benchmark-group-by=param:shape,param:pool

`extra_info["peak_mib"]` is memory above the inputs: the resident set's peak (VmHWM, reset after a first call at a small
size) of a process of its own, minus the resident set before. Linux only; None elsewhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.losses import PatchTextLoss

# images, patches, texts of an image, width
SHAPES = {"32x196x256": (32, 196, 8, 256), "128x196x512": (128, 196, 4, 256)}
POOLS = ("max", "softmax")


def einsum_form(patches: Tensor, texts: Tensor, scale: Tensor, pool: str) -> Tensor:
    """All scores at once, plain autograd, in the einsum's own type; no masks."""
    images, each, _ = texts.shape
    scores = torch.einsum("ipd,jd->ipj", patches, texts.flatten(0, 1))
    pooled = scores.amax(1) if pool == "max" else (torch.softmax(scores / 0.1, 1) * scores).sum(1)
    owner = torch.arange(images).repeat_interleave(each)
    logits = scale * pooled
    positive = logits[owner, torch.arange(images * each)]
    negatives = logits.masked_fill(owner == torch.arange(images)[:, None], float("-inf"))
    losses = F.softplus(negatives.logsumexp(0) - positive) + F.softplus(negatives.logsumexp(1)[owner] - positive)
    return losses.mean() / 2


def step(form: str, shape: tuple[int, int, int, int], pool: str) -> Callable[[], Tensor]:
    """A function that runs forward and backward on random unit-norm inputs and returns the loss."""
    images, patches, texts, width = shape
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(images, n, width), dim=-1).requires_grad_() for n in (patches, texts)]
    leaves.append(torch.tensor(14.0, requires_grad=True))
    loss = PatchTextLoss(pool=pool) if form == "streamed" else lambda *each: einsum_form(*each, pool)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves)
        value.backward()
        return value.detach()

    return run


def _status(field: str) -> float:
    """A size in MiB from /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _print_peak(form: str, shape: str, pool: str) -> None:
    torch.set_num_threads(1)
    step(form, (4, 8, 2, 16), pool)()
    run = step(form, SHAPES[shape], pool)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    print(_status("VmHWM") - before)


def peak_mib(form: str, shape: str, pool: str) -> float | None:
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, __file__, form, shape, pool]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("form", ["streamed", "einsum"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark: Callable, shape: str, pool: str, form: str) -> None:
    run = step(form, SHAPES[shape], pool)
    value = benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    torch.testing.assert_close(value, step("einsum", SHAPES[shape], pool)(), rtol=1e-4, atol=1e-4)
    benchmark.extra_info |= {"peak_mib": peak_mib(form, shape, pool), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
