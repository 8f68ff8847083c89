"""PatchTextLoss against the dense fp64 loss: pools, masks, exclusions, ties, ranks; the method's identities."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.kernels.patch_text import tiles
from cllip_fast.losses import ClipLoss, PatchTextLoss
from tests import dense, dense_local
from tests.ranks import on_ranks


def batch(images: int, patches: int, texts: int, width: int = 12) -> dict[str, Tensor]:
    """Features, a scale, ragged masks (the second image without text), texts that repeat and resemble each other."""
    generator = torch.Generator().manual_seed(1)
    names, _ = dense.features(7, width, seed=2)
    names[1] = F.normalize(names[0] + 0.3 * names[1], dim=0)
    ids = torch.randint(0, 7, (images, texts), generator=generator)
    mask = torch.rand(images, texts, generator=generator) < 0.7
    mask[1:2] = False
    patch_mask = torch.rand(images, patches, generator=generator) < 0.7
    patch_mask[:, 0] = True
    return {
        "patches": dense.features(images * patches, width, seed=3)[0].view(images, patches, width),
        "texts": names[ids],
        "scale": torch.tensor(20.0, dtype=torch.float64),
        "ids": ids,
        "mask": mask,
        "patch_mask": patch_mask,
    }


def features(b: dict[str, Tensor]) -> list[Tensor]:
    return [b["patches"], b["texts"], b["scale"]]


def everything_valid(b: dict[str, Tensor]) -> Tensor:
    return torch.ones_like(b["mask"])


@pytest.mark.parametrize("pool", ["max", "softmax"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 2), (2, 3, 1), (5, 7, 3), (17, 5, 4)])
def test_equals_dense(shape: tuple[int, int, int], pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllip_fast.kernels.patch_text.tiling.CPU_TILE", 60)
    b = batch(*shape)
    for threshold in (None, 0.9):
        for ids in (None, b["ids"]):
            for mask, patch_mask in ((everything_valid(b), None), (b["mask"], b["patch_mask"])):
                expected = dense.value_and_gradients(
                    lambda v, t, a, mask=mask, patch_mask=patch_mask, ids=ids, threshold=threshold: (
                        dense_local.patch_text(
                            v,
                            t,
                            a,
                            mask,
                            ids=ids,
                            patch_mask=patch_mask,
                            pool=pool,
                            temperature=0.2,
                            threshold=threshold,
                        )
                    ),
                    features(b),
                    2.5,
                )
                for chunk_size in (None, 1, 5):
                    loss = PatchTextLoss(
                        pool=pool, pool_temperature=0.2, filter_threshold=threshold, chunk_size=chunk_size
                    )
                    ours = dense.value_and_gradients(
                        lambda *each, loss=loss, mask=mask, ids=ids, patch_mask=patch_mask: loss(
                            *each, mask, ids, patch_mask
                        ),
                        features(b),
                        2.5,
                    )
                    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("patches", [255, 256, 300])
def test_number_of_the_best_patch_fits_its_type(patches: int) -> None:
    b = batch(2, patches, 2)
    b["patches"][0, 0] = b["patches"][1, patches - 1] = b["texts"][0, 0]
    mask = everything_valid(b)
    ours = dense.value_and_gradients(lambda *each: PatchTextLoss()(*each, mask), features(b))
    expected = dense.value_and_gradients(lambda v, t, a: dense_local.patch_text(v, t, a, mask), features(b))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("pool", ["max", "softmax"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(pool: str, scale: float, dtype: torch.dtype) -> None:
    b = batch(13, 6, 3)
    inputs = [b["patches"].to(dtype), b["texts"].to(dtype), torch.tensor(scale, dtype=dtype)]
    loss = PatchTextLoss(pool=pool, chunk_size=10)
    dense.assert_as_good_as_dense(
        lambda *each: loss(*each, b["mask"], b["ids"]),
        lambda v, t, a: dense_local.patch_text(v, t, a, b["mask"], ids=b["ids"], pool=pool),
        inputs,
    )


@pytest.mark.parametrize("pool", ["max", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_in_parts(pool: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts of the images as there are, or one: the same gradient of the patches."""
    b = batch(13, 6, 3)
    inputs = [b["patches"].to(dtype), b["texts"].to(dtype), torch.tensor(30.0, dtype=dtype)]
    loss = PatchTextLoss(pool=pool, backend="torch")
    calls = []
    whole = tiles.pool_backward
    monkeypatch.setattr(tiles, "pool_backward", lambda *given: calls.append(len(given[0])) or whole(*given))
    found = []
    for room in (2**20, 1):
        monkeypatch.setattr("cllip_fast.streaming.patch_walk.PART_BYTES", room)
        found.append(dense.value_and_gradients(lambda *each: loss(*each, b["mask"], b["ids"]), inputs)[1])
    assert calls == [13] + [1] * 13
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("pool", ["max", "softmax"])
def test_gradcheck(pool: str) -> None:
    b = batch(3, 4, 2, width=5)
    b["scale"] /= 5
    leaves = [each.requires_grad_() for each in features(b)]
    loss = PatchTextLoss(pool=pool, pool_temperature=0.3, chunk_size=4)
    assert torch.autograd.gradcheck(lambda *each: loss(*each, b["mask"], b["ids"], b["patch_mask"]), leaves)


def test_double_backward_is_refused() -> None:
    inputs = features(batch(3, 4, 2))
    leaf = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(PatchTextLoss()(leaf, *inputs[1:]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cllip_fast::patch_text is differentiable once"):
        gradient.sum().backward()


def test_each_gradient_alone() -> None:
    b = batch(4, 3, 2)
    _, expected = dense.value_and_gradients(PatchTextLoss(), features(b))
    for wanted in range(3):
        inputs = features(b)
        inputs[wanted] = inputs[wanted].clone().requires_grad_()
        (alone,) = torch.autograd.grad(PatchTextLoss()(*inputs), inputs[wanted])
        torch.testing.assert_close(alone, expected[wanted])


def test_a_tie_goes_to_the_first_patch() -> None:
    b = batch(3, 4, 2)
    b["patches"] = b["patches"][:, [0, 1, 1, 0, 0]]
    _, (d_patches, _, _) = dense.value_and_gradients(PatchTextLoss(), features(b))
    assert d_patches[:, :2].any()
    assert not d_patches[:, 2:].any()


def test_masked_patches_and_texts_are_never_looked_at() -> None:
    b = batch(9, 4, 3)
    b["patch_mask"][3] = False  # an image without any patch: as if it were not there
    arguments = (b["mask"], b["ids"], b["patch_mask"])
    dirty = [
        b["patches"].masked_fill(~b["patch_mask"][..., None], float("nan")),
        b["texts"].masked_fill(~b["mask"][..., None], float("inf")),
        b["scale"],
    ]
    kept = torch.arange(9) != 3
    for pool in ("max", "softmax"):
        loss = PatchTextLoss(pool=pool, filter_threshold=0.9)
        value, grads = dense.value_and_gradients(lambda *each, loss=loss: loss(*each, *arguments), dirty)
        expected, expected_grads = dense.value_and_gradients(
            lambda v, t, a, loss=loss: loss(v, t, a, *(each[kept] for each in arguments)),
            [b["patches"][kept], b["texts"][kept], b["scale"]],
        )
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close([grads[0][kept], grads[1][kept], grads[2]], expected_grads)
        assert not grads[0][3].any()
        assert not grads[1][3].any()


@pytest.mark.parametrize("pool", ["max", "softmax"])
@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 4, 0), (0, 4, 2), (0, 4, 0)])
def test_no_text_is_zero_with_a_graph(shape: tuple[int, int, int], pool: str) -> None:
    images, patches, texts = shape
    leaves = [
        torch.zeros(images, patches, 5, requires_grad=True),
        torch.zeros(images, texts, 5, requires_grad=True),
        torch.tensor(20.0, requires_grad=True),
    ]
    mask = torch.zeros(images, texts, dtype=torch.bool)
    loss = PatchTextLoss(pool=pool, filter_threshold=0.5)(*leaves, mask, mask.long())
    assert loss.item() == 0
    loss.backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in leaves)


def test_one_image_has_no_negatives() -> None:
    b = batch(1, 3, 4)
    value, grads = dense.value_and_gradients(PatchTextLoss(), features(b))
    assert value == 0
    assert not any(each.any() for each in grads)


@pytest.mark.parametrize("pool", ["max", "softmax"])
def test_identity_one_patch_one_text_is_clip(pool: str) -> None:
    images, texts = dense.features(23, 8)
    scale = torch.tensor(17.0, dtype=torch.float64)
    ours = dense.value_and_gradients(
        lambda v, t, a: PatchTextLoss(pool=pool)(v[:, None], t[:, None], a), [images, texts, scale]
    )
    torch.testing.assert_close(ours, dense.value_and_gradients(ClipLoss(), [images, texts, scale]))


def test_identity_order_of_images_texts_and_patches() -> None:
    b = batch(7, 6, 4)
    loss = PatchTextLoss(filter_threshold=0.9)
    expected = loss(*features(b), b["mask"], b["ids"], b["patch_mask"])
    images, patches, texts = torch.randperm(7), torch.randperm(6), torch.randperm(4)
    moved = loss(
        b["patches"][images][:, patches],
        b["texts"][images][:, texts],
        b["scale"],
        b["mask"][images][:, texts],
        b["ids"][images][:, texts],
        b["patch_mask"][images][:, patches],
    )
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("by_ids", [True, False])
def test_identity_a_duplicate_elsewhere_changes_nothing(by_ids: bool) -> None:
    """A pair of images, and a third one that shows the first text again: filtered, the first text's loss stays."""
    (patches, texts), scale = dense.features(3, 8), 20.0
    patches, texts = patches[:, None], texts[:, None].clone()
    texts[2] = texts[0]
    ids = torch.tensor([[0], [1], [0]]) if by_ids else None
    loss = PatchTextLoss(filter_threshold=None if by_ids else 0.9)
    logits = scale * patches[:, 0] @ texts[:, 0].t()
    # Image and text 0 see only 1; 2 likewise; 1 sees both others.
    negatives = {0: [0, 1], 1: [0, 1, 2], 2: [1, 2]}
    terms = [logits[i, seen].logsumexp(0) - logits[i, i] for i, seen in negatives.items()]
    terms += [logits[seen, i].logsumexp(0) - logits[i, i] for i, seen in negatives.items()]
    torch.testing.assert_close(loss(patches, texts, scale, None, ids), torch.stack(terms).mean())


def test_is_deterministic_and_never_holds_all_scores() -> None:
    b = batch(12, 196, 5, width=4)
    loss = PatchTextLoss(chunk_size=12)
    first = dense.value_and_gradients(lambda *each: loss(*each, b["mask"], b["ids"]), features(b))
    again = dense.value_and_gradients(lambda *each: loss(*each, b["mask"], b["ids"]), features(b))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(x, y) for x, y in zip(first[1], again[1], strict=True))
    leaves = [each.requires_grad_() for each in features(b)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss(*leaves, b["mask"], b["ids"])
    assert max(kept) <= max(b["patches"].numel(), 12 * 60)


def test_compiles_without_a_graph_break() -> None:
    b = batch(4, 3, 2)
    loss = PatchTextLoss(filter_threshold=0.9)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    arguments = (b["mask"], b["ids"], b["patch_mask"])
    torch.testing.assert_close(
        dense.value_and_gradients(lambda *each: compiled(*each, *arguments), features(b)),
        dense.value_and_gradients(lambda *each: loss(*each, *arguments), features(b)),
    )


def test_operator_passes_opcheck() -> None:
    b = batch(3, 4, 2)
    leaves = [each.requires_grad_() for each in features(b)]
    operator = torch.ops.cllip_fast.patch_text.default
    for pool in ("max", "softmax"):
        torch.library.opcheck(
            operator, (*leaves, b["mask"], b["ids"], b["patch_mask"], pool, 0.1, 0.9, "", 0, "auto", True)
        )


def several_ranks(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    b = batch(10, 5, 3)
    b["mask"][4:7] = False
    for counts in ((5, 5), (7, 3), (10, 0)):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for pool, threshold, ids, patch_mask in (
            ("max", None, None, None),
            ("max", 0.9, None, b["patch_mask"]),
            ("softmax", None, b["ids"], b["patch_mask"]),
        ):
            expected, expected_grads = dense.value_and_gradients(
                lambda v, t, a, pool=pool, threshold=threshold, ids=ids, patch_mask=patch_mask: dense_local.patch_text(
                    v, t, a, b["mask"], ids=ids, patch_mask=patch_mask, pool=pool, threshold=threshold
                ),
                features(b),
            )
            part = [None if each is None else each[own] for each in (b["mask"], ids, patch_mask)]
            for chunk_size in (None, 4):
                loss = PatchTextLoss(pool=pool, filter_threshold=threshold, group=group, chunk_size=chunk_size)
                value, grads = dense.value_and_gradients(
                    lambda *each, loss=loss, part=part: loss(*each, *part),
                    [b["patches"][own], b["texts"][own], b["scale"]],
                )
                torch.testing.assert_close(value, expected)
                torch.testing.assert_close(grads[0], world_size * expected_grads[0][own])
                torch.testing.assert_close(grads[1], world_size * expected_grads[1][own])
                torch.testing.assert_close(grads[2], expected_grads[2])
    assert PatchTextLoss(group=group)(*features(b), torch.zeros_like(b["mask"])).item() == 0


def test_several_ranks() -> None:
    on_ranks(2, several_ranks)


def test_bad_inputs() -> None:
    v, t, mask = torch.zeros(4, 6, 3), torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool)
    loss = PatchTextLoss()
    assert set(loss(v, t, 1.0, output_dict=True)) == {"patch_loss"}
    with pytest.raises(InputError, match=r"patch_features has shape \[4, 3\], expected \[B, P, D\]"):
        loss(v[:, 0], t, 1.0)
    with pytest.raises(InputError, match=r"patch_features has shape \[4, 0, 3\], expected at least one patch an image"):
        loss(v[:, :0], t, 1.0)
    with pytest.raises(InputError, match=r"text_features has shape \[3, 2, 3\], expected \[4, T, 3\]"):
        loss(v, t[:3], 1.0)
    with pytest.raises(InputError, match=r"text_features has dtype torch.int64, expected a floating-point type"):
        loss(v, t.long(), 1.0)
    with pytest.raises(InputError, match=r"logit_scale has shape \[2\], expected \[\] or \[1\]"):
        loss(v, t, torch.ones(2))
    with pytest.raises(InputError, match=r"mask has shape \[4, 6\], expected \[4, 2\]"):
        loss(v, t, 1.0, torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(InputError, match=r"mask has dtype torch.float32, expected torch.bool"):
        loss(v, t, 1.0, mask.float())
    with pytest.raises(InputError, match=r"group_ids has dtype torch.bool, expected integers"):
        loss(v, t, 1.0, mask, mask)
    with pytest.raises(InputError, match=r"patch_mask has shape \[4, 2\], expected \[4, 6\]"):
        loss(v, t, 1.0, patch_mask=mask)
    with pytest.raises(InputError, match="text_features is on meta, but patch_features is on cpu"):
        loss(v, t.to("meta"), 1.0)
    with pytest.raises(InputError, match="pool is 'mean', expected one of max, softmax"):
        PatchTextLoss(pool="mean")
    with pytest.raises(InputError, match="pool_temperature is 0, expected a number above 0"):
        PatchTextLoss(pool_temperature=0)
    with pytest.raises(InputError, match=r"filter_threshold is 1\.5, expected a cosine"):
        PatchTextLoss(filter_threshold=1.5)
    with pytest.raises(InputError, match="chunk_size is -1"):
        PatchTextLoss(chunk_size=-1)
    with pytest.raises(InputError, match="backend is 'numpy', expected one of auto, triton, native, torch"):
        PatchTextLoss(backend="numpy")
    if extras.probe("triton"):
        with pytest.raises(InputError, match="which runs on GPUs only, but the features are on cpu"):
            PatchTextLoss(backend="triton")(v, t, 1.0)
    assert loss(v + float("nan"), t, 1.0).isnan()
