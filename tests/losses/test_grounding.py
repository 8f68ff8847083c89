"""GroundingLoss and the box arithmetic: dense fp64 values, degenerate boxes, masks, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.losses import GroundingLoss
from cllip_fast.losses.boxes import box_area, box_giou, box_iou
from tests import dense, dense_local
from tests.ranks import on_ranks

KINDS = ["mse", "l1_giou"]


def boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 2, 2, generator=generator, dtype=torch.float64).sort(-2).values.flatten(-2)


def reference(predicted: Tensor, truth: Tensor, mask: Tensor, kind: str) -> Tensor:
    losses = []
    for each, wanted in zip(predicted[mask], truth[mask], strict=True):
        if kind == "mse":
            losses.append(((each - wanted) ** 2).mean())
        else:
            losses.append(2.5 * (each - wanted).abs().mean() + 1 - dense_local.giou(each, wanted))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (123, 1)])
def test_equals_dense(shape: tuple[int, int], kind: str) -> None:
    truth = boxes(*shape, seed=1)
    ragged = torch.rand(shape) < 0.5
    ragged[0, 0] = True
    for mask in (None, ragged):
        torch.testing.assert_close(
            dense.value_and_gradients(lambda p, mask=mask: GroundingLoss(kind=kind)(p, truth, mask), [boxes(*shape)]),
            dense.value_and_gradients(
                lambda p, mask=mask: reference(p, truth, torch.ones(shape).bool() if mask is None else mask, kind),
                [boxes(*shape)],
            ),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(kind: str, dtype: torch.dtype) -> None:
    truth, mask = boxes(17, 3, seed=1), torch.ones(17, 3, dtype=torch.bool)
    predicted = boxes(17, 3).to(dtype)
    dense.assert_as_good_as_dense(
        lambda p, weight: weight * GroundingLoss(kind=kind)(p, truth.to(dtype)),
        lambda p, weight: weight * reference(p, truth.to(dtype).to(p.dtype), mask, kind),
        [predicted, torch.ones((), dtype=dtype)],
    )
    assert GroundingLoss(kind=kind)(predicted, truth.float()).dtype == torch.float32


def test_giou_by_hand() -> None:
    whole, left, right, quarter = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.75, 0.75, 1, 1]])
    assert box_area(quarter) == 0.0625
    assert box_iou(whole, left) == box_giou(whole, left) == 0.5
    assert box_iou(left, right) == box_giou(left, right) == 0
    torch.testing.assert_close(box_giou(left, quarter), torch.tensor(-(1 - 0.5 - 0.0625)))
    pairs = box_iou(torch.stack([whole, left])[:, None], torch.stack([whole, left, right]))
    torch.testing.assert_close(pairs, torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.0]]))


def test_gradcheck() -> None:
    predicted, truth = boxes(3, 2).requires_grad_(), boxes(3, 2, seed=1)
    for kind in KINDS:
        loss = GroundingLoss(kind=kind, l1_weight=0.7, giou_weight=1.3)
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, truth), predicted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "predicted",
    [
        [0.8, 0.7, 0.2, 0.1],  # corners in the wrong order
        [0.5, 0.5, 0.5, 0.5],  # a point
        [0.2, 0.7, 0.6, 0.1],  # wrong in one direction
        [-50.0, 3.0, 900.0, 7.0],
        [1e-30, 0.0, 2e-30, 1e-30],
    ],
)
def test_degenerate_predictions_are_finite(predicted: list[float], dtype: torch.dtype) -> None:
    for truth in ([0.3, 0.3, 0.6, 0.6], [0.5, 0.5, 0.5, 0.5], predicted):
        for kind in KINDS:
            p = torch.tensor([[predicted]], dtype=dtype, requires_grad=True)
            loss = GroundingLoss(kind=kind)(p, torch.tensor([[truth]], dtype=dtype))
            loss.backward()
            assert loss.isfinite()
            assert loss >= 0
            assert p.grad.isfinite().all()
    first, second = torch.tensor(predicted), torch.tensor([0.3, 0.3, 0.6, 0.6])
    assert 0 <= box_iou(first, second) <= 1
    assert -1 <= box_giou(first, second) <= 1


def test_wrong_order_is_pulled_back() -> None:
    """A prediction that is inside out has IoU 0, and descending its loss brings it onto the truth."""
    truth = torch.tensor([[[0.2, 0.3, 0.7, 0.8]]])
    p = torch.tensor([[[0.7, 0.8, 0.2, 0.3]]], requires_grad=True)
    assert box_iou(p, truth).item() == 0
    optimizer = torch.optim.Adam([p], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        GroundingLoss(kind="l1_giou")(p, truth).backward()
        optimizer.step()
    assert box_iou(p, truth).item() > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_looked_at(kind: str) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    truth, loss = boxes(2, 2, seed=1), GroundingLoss(kind=kind)
    dirty = boxes(2, 2).masked_fill(~mask[..., None], float("nan"))
    value, (gradient,) = dense.value_and_gradients(
        lambda p: loss(p, truth.masked_fill(~mask[..., None], float("inf")), mask), [dirty]
    )
    torch.testing.assert_close(value, loss(boxes(2, 2)[mask][:, None], truth[mask][:, None]))
    assert not gradient[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_no_region_is_zero_with_a_graph(shape: tuple[int, int], kind: str) -> None:
    p = torch.zeros(*shape, 4, requires_grad=True)
    loss = GroundingLoss(kind=kind)(p, torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(p.grad, torch.zeros_like(p))


def several_ranks(rank: int, world_size: int) -> None:
    predicted, truth = boxes(7, 2), boxes(7, 2, seed=1)
    mask = torch.rand(7, 2, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[5:] = False
    for counts in ((4, 3), (5, 2), (7, 0)):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for kind in KINDS:
            expected, (expected_grad,) = dense.value_and_gradients(
                lambda p, kind=kind: reference(p, truth, mask, kind), [predicted]
            )
            loss = GroundingLoss(kind=kind, group=dist.group.WORLD)
            value, (gradient,) = dense.value_and_gradients(
                lambda p, loss=loss, own=own: loss(p, truth[own], mask[own]), [predicted[own]]
            )
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(gradient, world_size * expected_grad[own])


def test_several_ranks() -> None:
    on_ranks(2, several_ranks)


def test_operator_passes_opcheck() -> None:
    arguments = (torch.tensor(3.0, requires_grad=True), torch.tensor(2.0), "")
    torch.library.opcheck(torch.ops.cllip_fast.global_mean.default, arguments)


def test_bad_inputs() -> None:
    p, mask = torch.zeros(4, 2, 4), torch.ones(4, 2, dtype=torch.bool)
    loss = GroundingLoss()
    assert set(loss(p, p, output_dict=True)) == {"grounding_loss"}
    with pytest.raises(InputError, match=r"predicted_boxes has shape \[4, 4\], expected \[B, M, 4\]"):
        loss(p[:, 0], p)
    with pytest.raises(InputError, match=r"boxes has shape \[4, 1, 4\], expected \[4, 2, 4\]"):
        loss(p, p[:, :1])
    with pytest.raises(InputError, match=r"boxes has dtype torch.int64, expected a floating-point type"):
        loss(p, p.long())
    with pytest.raises(InputError, match=r"mask has shape \[4, 1\], expected \[4, 2\]"):
        loss(p, p, mask[:, :1])
    with pytest.raises(InputError, match="kind is 'l2', expected one of mse, l1_giou"):
        GroundingLoss(kind="l2")
    with pytest.raises(InputError, match="giou_weight is -1, expected a number of at least 0"):
        GroundingLoss(giou_weight=-1)
