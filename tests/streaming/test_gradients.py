"""Gradients on their way home: the text chunks' type, and casts that take no second room."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from cllip_fast.exchange import Exchange
from cllip_fast.streaming import gradients
from cllip_fast.streaming.gradients import TextGradients, cast_in_place
from cllip_fast.streaming.info_nce import info_nce
from tests import dense


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CAST_ELEMENTS", 7)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 7), (1, 8), (2, 7), (13, 11), (64, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_in_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(shape)
    exact = values.to(dtype)
    found = cast_in_place(values, dtype)
    assert torch.equal(found, exact)
    assert found.is_contiguous()
    assert (found.data_ptr() == values.data_ptr()) == (values.numel() > 7 or values.numel() == 0)


@pytest.mark.usefixtures("_small_pieces")
def test_the_same_or_a_larger_type_is_no_cast_in_place() -> None:
    values = torch.randn(5, 8)
    assert cast_in_place(values, torch.float32) is values
    assert torch.equal(cast_in_place(values, torch.float64), values.double())


@pytest.mark.parametrize("wire", [None, torch.float32, torch.bfloat16])
def test_text_gradients_of_one_rank(wire: torch.dtype | None) -> None:
    """Chunks of several sizes, each from zeros; kept in the type asked for, and no more than one chunk beside them."""
    exact, like = torch.randn(11, 3), torch.empty(0)
    collected = TextGradients(Exchange(""), (11,), 3, like, True, wire)
    rooms = set()
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        chunk = collected.chunk(slice(start, stop))
        assert chunk.dtype == torch.float32
        assert not chunk.any()
        chunk += exact[start:stop]
        rooms.add(chunk.data_ptr())
        collected.send(slice(start, stop))
    assert torch.equal(collected.collect(11), exact.to(wire or torch.float32))
    assert len(rooms) == (1 if wire == torch.bfloat16 else 3)


def test_text_gradients_that_nobody_wants() -> None:
    collected = TextGradients(Exchange(""), (4,), 3, torch.empty(0), False, torch.bfloat16)
    assert collected.chunk(slice(0, 4)).numel() == 0
    collected.send(slice(0, 4))
    assert collected.collect(4).numel() == 0


@pytest.mark.usefixtures("_small_pieces")
def test_an_operator_may_return_it() -> None:
    """The gradient's memory is larger than the gradient: PyTorch's checks, accumulation, and a compiled caller."""
    rows, texts = (each.requires_grad_() for each in dense.features(34, 8, torch.bfloat16))
    scale = torch.tensor(10.0)
    flags = ("", False, True, 7, "torch", True)
    opcheck(torch.ops.cllip_fast.info_nce.default, (rows, texts, scale, None, None, None, *flags))

    def loss(rows: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return info_nce(rows, texts, scale, chunk_size=7, backend="torch")

    once = torch.autograd.grad(loss(rows, texts), [rows, texts])
    for _ in range(2):
        loss(rows, texts).backward()
    for leaf, gradient in zip((rows, texts), once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, gradient in zip(torch.autograd.grad(compiled(rows, texts), [rows, texts]), once, strict=True):
        assert torch.equal(found, gradient)
