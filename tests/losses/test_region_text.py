"""RegionTextLoss against the fp64 dense loss: filter, ids, ragged regions, empty ranks; the method's identities."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.losses import ClipLoss, RegionTextLoss
from tests import dense
from tests.ranks import on_ranks


def regions(images: int, each: int, width: int = 12, names: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, texts that repeat (`names` kinds, some of them close to each other), ids, ragged mask."""
    found, _ = dense.features(images * each, width, seed=1)
    kinds, _ = dense.features(names, width, seed=2)
    kinds[1] = F.normalize(kinds[0] + 0.3 * kinds[1], dim=0)
    ids = torch.randint(0, names, (images, each), generator=torch.Generator().manual_seed(3))
    mask = torch.rand(images, each, generator=torch.Generator().manual_seed(4)) < 0.6
    return found.view(images, each, width), kinds[ids], ids, mask


def settings(ids: Tensor, mask: Tensor) -> list[tuple[float | None, Tensor | None, Tensor | None]]:
    return [(None, None, None), (0.9, None, None), (None, None, ids), (0.9, mask, None), (0.8, mask, ids)]


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (31, 4), (127, 4)])
@pytest.mark.parametrize("chunk_size", [None, 13])
def test_equals_dense(shape: tuple[int, int], chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllip_fast.kernels.block.TILE_ELEMENTS", 2000)
    found, texts, ids, mask = regions(*shape)
    scale = torch.tensor(30.0, dtype=torch.float64)
    for threshold, kept, same in settings(ids, mask):
        loss = RegionTextLoss(filter_threshold=threshold, chunk_size=chunk_size)
        ours = dense.value_and_gradients(
            lambda *each, loss=loss, kept=kept, same=same: loss(*each, kept, same), [found, texts, scale], 2.5
        )
        flat = [None if each is None else each.flatten() for each in (kept, same)]
        expected = dense.value_and_gradients(
            lambda x, y, a, flat=flat, threshold=threshold: dense.region(
                x.flatten(0, 1), y.flatten(0, 1), a, flat[0], flat[1], threshold
            ),
            [found, texts, scale],
            2.5,
        )
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(scale: float, dtype: torch.dtype) -> None:
    found, texts, ids, mask = regions(31, 4)
    inputs = [found.to(dtype), texts.to(dtype), torch.tensor(scale, dtype=dtype)]
    dense.assert_as_good_as_dense(
        lambda *each: RegionTextLoss(chunk_size=40)(*each, mask, ids),
        lambda x, y, a: dense.region(x.flatten(0, 1), y.flatten(0, 1), a, mask.flatten(), ids.flatten(), 0.9),
        inputs,
    )


def test_filter_takes_the_cosine_of_unnormalised_texts() -> None:
    found, texts, _, _ = regions(9, 3)
    lengths = torch.linspace(0.2, 5, 27, dtype=torch.float64).view(9, 3, 1)
    loss = RegionTextLoss(filter_threshold=0.9)(found, texts * lengths, 10.0)
    expected = dense.region(found.flatten(0, 1), (texts * lengths).flatten(0, 1), 10.0, threshold=0.9)
    torch.testing.assert_close(loss, expected)


def test_padding_is_never_looked_at() -> None:
    found, texts, ids, mask = regions(9, 4)
    scale = torch.tensor(20.0, dtype=torch.float64)
    padded = ~mask[..., None]
    inputs = [found.masked_fill(padded, float("nan")), texts.masked_fill(padded, float("inf")), scale]
    ours = dense.value_and_gradients(lambda *each: RegionTextLoss()(*each, mask, ids), inputs)
    clean = [found.masked_fill(padded, 0), texts.masked_fill(padded, 0), scale]
    torch.testing.assert_close(ours, dense.value_and_gradients(lambda *each: RegionTextLoss()(*each, mask, ids), clean))
    assert not ours[1][0][~mask].any()


@pytest.mark.parametrize("shape", [(3, 2), (0, 4)])
def test_no_region_is_zero_with_a_graph(shape: tuple[int, int]) -> None:
    found = torch.zeros(*shape, 8, requires_grad=True)
    texts = torch.zeros(*shape, 8, requires_grad=True)
    scale = torch.tensor(20.0, requires_grad=True)
    loss = RegionTextLoss()(found, texts, scale, torch.zeros(shape, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in (found, texts, scale))


def test_identity_one_region_an_image_is_clip() -> None:
    images, texts = dense.features(23, 8)
    scale = torch.tensor(17.0, dtype=torch.float64)
    region = dense.value_and_gradients(RegionTextLoss(filter_threshold=None), [images[:, None], texts[:, None], scale])
    clip = dense.value_and_gradients(ClipLoss(), [images, texts, scale])
    assert torch.equal(region[0], clip[0])
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(region[1], clip[1], strict=True))


def test_identity_order_and_duplicates() -> None:
    found, texts, ids, mask = (each.flatten(0, 1) for each in regions(7, 4))
    loss = RegionTextLoss()
    order = torch.randperm(28)
    torch.testing.assert_close(
        loss(found[order], texts[order], 20.0, mask[order], ids[order]), loss(found, texts, 20.0, mask, ids)
    )
    # A row's own loss: with the filter, one more region of the same text changes neither this row nor this column.
    pair, other = dense.features(2, 12)
    both = (torch.cat([pair, other[:1]]), torch.cat([other, other[:1]]))
    third = dense.region(both[0][2:], both[1][2:], 20.0)
    assert third == 0
    logits = 20 * both[0] @ both[1].t()
    rows = logits[0, :2].logsumexp(0) - logits[0, 0] + logits[:2, 0].logsumexp(0) - logits[0, 0]
    rows += logits[1].logsumexp(0) - logits[1, 1] + logits[:, 1].logsumexp(0) - logits[1, 1]
    rows += logits[2, 1:].logsumexp(0) - logits[2, 2] + logits[1:, 2].logsumexp(0) - logits[2, 2]
    torch.testing.assert_close(loss(*both, 20.0), rows / 6)


def several_ranks(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    found, texts, ids, mask = regions(6 * world_size, 4)
    mask[6:12] = False  # rank 1 has no region
    for counts in ((6,) * world_size, (3, 5, 0, 9)[:world_size]):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        used = slice(0, sum(counts))
        for threshold, kept, same in settings(ids, mask):
            part = [None if each is None else each[own] for each in (kept, same)]
            whole = [None if each is None else each[used].flatten() for each in (kept, same)]
            inputs = [found, texts, torch.tensor(30.0, dtype=torch.float64)]
            expected, expected_grads = dense.value_and_gradients(
                lambda x, y, a, whole=whole, threshold=threshold: dense.region(
                    x.flatten(0, 1), y.flatten(0, 1), a, *whole, threshold
                ),
                [found[used], texts[used], inputs[2]],
            )
            for chunk_size in (None, 5 * world_size):
                loss = RegionTextLoss(filter_threshold=threshold, group=group, chunk_size=chunk_size)
                value, grads = dense.value_and_gradients(
                    lambda *each, loss=loss, part=part: loss(*each, *part), [found[own], texts[own], inputs[2]]
                )
                torch.testing.assert_close(value, expected)
                for side in range(2):
                    torch.testing.assert_close(grads[side], world_size * expected_grads[side][own])
                torch.testing.assert_close(grads[2], expected_grads[2])
    nothing = RegionTextLoss(group=group)(found[own], texts[own], 30.0, torch.zeros_like(mask[own]))
    assert nothing.item() == 0
    with pytest.raises(InputError, match="same width and dtype on every rank"):
        RegionTextLoss(group=group)(found[own][..., : 5 + rank], texts[own][..., : 5 + rank], 30.0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks(world_size: int) -> None:
    on_ranks(world_size, several_ranks)


def test_bad_inputs() -> None:
    x, mask = torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool)
    loss = RegionTextLoss()
    assert set(loss(x, x, 1.0, output_dict=True)) == {"region_loss"}
    with pytest.raises(InputError, match=r"region_features has shape \[3\], expected \[B, M, D\] or \[R, D\]"):
        loss(x[0, 0], x[0, 0], 1.0)
    with pytest.raises(InputError, match=r"text_features has shape \[4, 1, 3\], expected \[4, 2, 3\]"):
        loss(x, x[:, :1], 1.0)
    with pytest.raises(InputError, match=r"mask has shape \[4\], expected \[4, 2\]"):
        loss(x, x, 1.0, mask[:, 0])
    with pytest.raises(InputError, match=r"mask has dtype torch.float32, expected torch.bool"):
        loss(x, x, 1.0, mask.float())
    with pytest.raises(InputError, match=r"group_ids has dtype torch.float32, expected integers"):
        loss(x, x, 1.0, mask, mask.float())
    with pytest.raises(InputError, match=r"filter_threshold is 1\.5, expected a cosine"):
        RegionTextLoss(filter_threshold=1.5)
    with pytest.raises(InputError, match="backend is 'cuda', expected one of auto, triton, native, torch"):
        RegionTextLoss(backend="cuda")
    assert loss(x + float("nan"), x, 1.0).isnan()
