"""CoCaLoss and DistillClipLoss against the dense forms and the real OpenCLIP, one rank and two, all flag pairs."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.losses import CoCaLoss, DistillClipLoss
from tests import dense
from tests.openclip_peer import openclip_losses
from tests.ranks import on_ranks


def distill_inputs(rows: int, seed: int = 0, scale: float = 30.0) -> tuple[list[Tensor], list[Tensor]]:
    student = [*dense.features(rows, 16, seed=seed), torch.tensor(scale, dtype=torch.float64)]
    teacher = [*dense.features(rows, 11, seed=seed + 1), torch.tensor([45.0], dtype=torch.float64)]
    return student, teacher


def both(losses: tuple[Tensor, Tensor]) -> Tensor:
    return losses[0] - 0.3 * losses[1]


@pytest.mark.parametrize("rows", [1, 17, 123])
@pytest.mark.parametrize("chunk_size", [None, 10])
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_distill_equals_dense_and_openclip(
    rows: int, chunk_size: int | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 500)
    student, teacher = distill_inputs(rows, scale=scale)
    loss = DistillClipLoss(chunk_size=chunk_size)
    contrastive, distillation = loss(*student, *teacher)
    torch.testing.assert_close(contrastive, dense.clip(*student))
    torch.testing.assert_close(distillation, dense.distill(*student, *teacher))
    peer = openclip_losses().DistillClipLoss()
    ours = dense.value_and_gradients(lambda *each: both(loss(*each, *teacher)), student, upstream=1.5)
    expected = dense.value_and_gradients(lambda *each: both(peer(*each, *teacher)), student, upstream=1.5)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distill_low_precision(dtype: torch.dtype) -> None:
    student, teacher = ([each.to(dtype) for each in part] for part in distill_inputs(61))
    loss = DistillClipLoss(chunk_size=20)
    dense.assert_as_good_as_dense(
        lambda *each: loss(*each, *(part.to(each[0].dtype) for part in teacher))[1],
        lambda *each: dense.distill(*each, *(part.to(each[0].dtype) for part in teacher)),
        student,
    )


def test_distill_bad_inputs() -> None:
    student, teacher = distill_inputs(6)
    loss = DistillClipLoss()
    assert set(loss(*student, *teacher, output_dict=True)) == {"contrastive_loss", "distill_loss"}
    with pytest.raises(InputError, match="dist_image_features has 4 rows, but image_features has 6"):
        loss(*student, teacher[0][:4], teacher[1][:4], teacher[2])
    with pytest.raises(InputError, match="must not require gradients: detach"):
        loss(*student, teacher[0].requires_grad_(), *teacher[1:])


def caption_inputs(rows: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, 5, 13, dtype=torch.float64)
    labels = torch.randint(0, 13, (rows, 5))
    labels[0] = 0
    return logits, labels


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.5), (1.0, 0.0)])
def test_coca_equals_openclip(weights: tuple[float, float]) -> None:
    logits, labels = caption_inputs(9)
    images, texts = dense.features(9, 16)
    scale = torch.tensor(20.0, dtype=torch.float64)
    results = []
    for loss in (CoCaLoss(*weights, pad_id=3), openclip_losses().CoCaLoss(*weights, pad_id=3)):
        inputs = [images, texts, logits, scale] if weights[1] else [logits]
        fixed = [] if weights[1] else [images, texts]
        results.append(
            dense.value_and_gradients(
                lambda *each, loss=loss, fixed=fixed: both(
                    loss(*fixed, *each[:-1], labels, each[-1]) if not fixed else loss(*fixed, *each, labels, scale)
                ),
                inputs,
            )
        )
    torch.testing.assert_close(*results)


def test_coca_dict_and_bad_inputs() -> None:
    logits, labels = caption_inputs(4)
    images, texts = dense.features(4, 8)
    loss = CoCaLoss(2.0, 1.0)
    assert set(loss(images, texts, logits, labels, 10.0, output_dict=True)) == {"contrastive_loss", "caption_loss"}
    with pytest.raises(InputError, match=r"labels has shape \[3, 5\], expected \[4, 5\]"):
        loss(images, texts, logits, labels[:3], 10.0)
    with pytest.raises(InputError, match=r"logits has shape \[20, 13\]"):
        loss(images, texts, logits.flatten(0, 1), labels, 10.0)


def two_ranks(rank: int, world_size: int) -> None:
    warnings.simplefilter("ignore")
    student, teacher = distill_inputs(9 * world_size)
    own = slice(9 * rank, 9 * rank + 9)
    student, teacher = ([each[own] if each.dim() == 2 else each for each in part] for part in (student, teacher))
    for local_loss, gather_with_grad in itertools.product([False, True], repeat=2):
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": world_size}
        peer = openclip_losses().DistillClipLoss(**flags)
        expected = dense.value_and_gradients(lambda *each, peer=peer: both(peer(*each, *teacher)), student)
        for chunk_size in (None, 4 * world_size):
            loss = DistillClipLoss(**flags, chunk_size=chunk_size)
            ours = dense.value_and_gradients(lambda *each, loss=loss: both(loss(*each, *teacher)), student)
            torch.testing.assert_close(ours, expected, msg=lambda text, flags=flags: f"{flags}: {text}")
        logits, labels = caption_inputs(9)
        ours, expected = (
            module.CoCaLoss(2.0, 1.0, **flags)(student[0], student[1], logits, labels, student[2])
            for module in (openclip_losses(), __import__("cllip_fast.losses", fromlist=["CoCaLoss"]))
        )
        torch.testing.assert_close(ours, expected)


def test_two_ranks() -> None:
    on_ranks(2, two_ranks)
