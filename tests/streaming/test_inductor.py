"""Compiled with Inductor, torch.compile's default back end; and second derivatives, which are refused."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import CustomOpDef, custom_op, opcheck

from cllip_fast.losses import ClipLoss, RegionTextLoss, SigLipLoss
from cllip_fast.streaming.once import differentiable_once

COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"Inductor needs a C++ compiler: no {COMPILER}"
)
ROWS = 34


class Pair(nn.Module):
    """A model and its loss in one graph."""

    def __init__(self, loss: nn.Module, *constants: Tensor) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.log_scale, self.loss, self.constants = nn.Parameter(torch.tensor(2.0)), loss, constants

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return self.loss(*features, self.log_scale.exp(), *self.constants)


def pairs() -> dict[str, Pair]:
    mask, ids = torch.rand(ROWS) < 0.7, torch.randint(0, 5, (ROWS,))
    return {
        "clip": Pair(ClipLoss(chunk_size=13)),
        "clip, small": Pair(ClipLoss()),
        "siglip": Pair(SigLipLoss(chunk_size=13), torch.tensor(-3.0)),
        "region": Pair(RegionTextLoss(), mask, ids),
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"Inductor needs a C++ compiler, and there is no {COMPILER}")
@pytest.mark.parametrize("name", pairs())
# Inductor's graphs on disk know operators by name: one of an earlier version would be taken for this one's.
@torch._functorch.config.patch(enable_autograd_cache=False)
@torch._inductor.config.patch(fx_graph_cache=False)
def test_as_eager(name: str) -> None:
    pair, inputs = pairs()[name], (torch.randn(ROWS, 6), torch.randn(ROWS, 5))
    results = []
    for run in (pair, torch.compile(pair, fullgraph=True)):
        loss = run(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(pair.parameters()))))
    torch.testing.assert_close(*results)


numbers = itertools.count()


@pytest.fixture
def cube() -> CustomOpDef:
    """An operator x³ whose backward operator is differentiable once, under a new name."""
    name = f"cllip_fast_test::cube{next(numbers)}"

    @custom_op(name, mutates_args=())
    def forward(x: Tensor) -> Tensor:
        return x**3

    @custom_op(f"{name}_backward", mutates_args=())
    def backward(gradient: Tensor, x: Tensor, factor: Tensor | None, need: bool) -> tuple[Tensor, Tensor]:
        return 3 * x**2 * gradient, x.new_empty(0)

    forward.register_fake(torch.empty_like)
    backward.register_fake(lambda gradient, x, *_: (torch.empty_like(x), x.new_empty(0)))
    differentiable_once(backward)
    forward.register_autograd(
        lambda ctx, gradient: backward(gradient, *ctx.saved_tensors, None, True)[0],
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return forward


def test_second_derivative_is_refused(cube: CustomOpDef) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
    assert gradient.tolist() == [3.0, 12.0]  # the first derivative is not hindered
    with pytest.raises(RuntimeError, match=r"^cllip_fast_test::cube\d+ is differentiable once: "):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.autograd.functional.hessian(lambda x: cube(x).sum(), x)


def test_once_is_traceable(cube: CustomOpDef) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    opcheck(cube, (x,))
    compiled = torch.compile(lambda x: cube(x).sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    assert gradient.tolist() == [3.0, 12.0]
