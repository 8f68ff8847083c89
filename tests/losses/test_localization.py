"""PatchLocalizationLoss against the dense fp64 loss: which patches are in a box, other images, masks, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.kernels.localize.boxes import patch_spans, patches_in_boxes
from cllip_fast.losses import PatchLocalizationLoss
from tests import dense, dense_local
from tests.ranks import on_ranks


def batch(images: int, grid: tuple[int, int], texts: int, width: int = 9) -> dict[str, Tensor]:
    """Features, boxes (a tiny one and one of the whole image among them), ragged masks, repeated texts."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(images, texts, 2, 2, generator=generator, dtype=torch.float64).sort(2).values
    boxes = corners.flatten(2)
    if texts:
        boxes[0:1, 0, 2:] = boxes[0:1, 0, :2] + 0.01
        boxes[1:2, 0] = torch.tensor([0.0, 0, 1, 1])
    ids = torch.randint(0, 5, (images, texts), generator=generator)
    patches = grid[0] * grid[1]
    return {
        "patches": dense.features(images * patches, width, seed=3)[0].view(images, patches, width),
        "texts": dense.features(images * texts, width, seed=4)[0].view(images, texts, width),
        "scale": torch.tensor(20.0, dtype=torch.float64),
        "boxes": boxes,
        "ids": ids,
        "mask": torch.rand(images, texts, generator=generator) < 0.7,
    }


def features(b: dict[str, Tensor]) -> list[Tensor]:
    return [b["patches"], b["texts"], b["scale"]]


@pytest.mark.parametrize("other_images", [False, True])
@pytest.mark.parametrize(("images", "grid", "texts"), [(1, (1, 1), 1), (2, (3, 4), 3), (5, (3, 3), 4), (17, (5, 2), 2)])
def test_equals_dense(
    images: int, grid: tuple[int, int], texts: int, other_images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllip_fast.kernels.patch_text.tiling.CPU_TILE", 60)
    b = batch(images, grid, texts)
    for mask in (torch.ones_like(b["mask"]), b["mask"]):
        for ids in (None, b["ids"]):
            ours = dense.value_and_gradients(
                lambda v, t, a, mask=mask, ids=ids: PatchLocalizationLoss(other_images=other_images)(
                    v, t, b["boxes"], a, mask, grid, ids
                ),
                features(b),
                2.5,
            )
            expected = dense.value_and_gradients(
                lambda v, t, a, mask=mask, ids=ids: dense_local.localization(
                    v, t, b["boxes"], a, mask, grid, other_images=other_images, ids=ids
                ),
                features(b),
                2.5,
            )
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("other_images", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(other_images: bool, scale: float, dtype: torch.dtype) -> None:
    b = batch(7, (3, 4), 3)
    loss = PatchLocalizationLoss(other_images=other_images)
    dense.assert_as_good_as_dense(
        lambda v, t, a: loss(v, t, b["boxes"], a, b["mask"], (3, 4), b["ids"]),
        lambda v, t, a: dense_local.localization(
            v, t, b["boxes"], a, b["mask"], (3, 4), other_images=other_images, ids=b["ids"]
        ),
        [b["patches"].to(dtype), b["texts"].to(dtype), torch.tensor(scale, dtype=dtype)],
    )


@pytest.mark.parametrize("other_images", [False, True])
def test_gradcheck(other_images: bool) -> None:
    b = batch(3, (2, 2), 2, width=4)
    b["scale"] /= 5
    leaves = [each.requires_grad_() for each in features(b)]
    loss = PatchLocalizationLoss(other_images=other_images)
    assert torch.autograd.gradcheck(lambda v, t, a: loss(v, t, b["boxes"], a, b["mask"], None, b["ids"]), leaves)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ([0.0, 0.0, 1.0, 1.0], range(8)),
        ([0.0, 0.0, 0.5, 0.5], [0, 1]),
        ([0.125, 0.25, 0.375, 0.25], [0, 1]),  # centres on the border are inside
        ([0.3, 0.6, 0.33, 0.65], [5]),  # no centre inside: the patch around the box's centre
        ([1.0, 1.0, 1.0, 1.0], [7]),
        ([0.9, 0.9, 0.6, 0.6], [7]),  # corners in the wrong order hold no centre
        ([-3.0, 5.0, -2.0, 6.0], [4]),
    ],
)
def test_patches_in_a_box(box: list[float], inside: list[int]) -> None:
    found = patches_in_boxes(torch.tensor([box]), (2, 4))
    assert found.shape == (1, 8)
    assert found[0].nonzero().flatten().tolist() == list(inside)


def test_a_box_of_the_whole_image_costs_nothing_alone() -> None:
    b = batch(2, (3, 3), 2)
    whole = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64).expand(2, 2, 4)
    value, grads = dense.value_and_gradients(lambda v, t, a: PatchLocalizationLoss()(v, t, whole, a), features(b))
    assert value == 0
    assert not any(each.any() for each in grads)
    assert PatchLocalizationLoss(other_images=True)(b["patches"], b["texts"], whole, b["scale"]) > 0


@pytest.mark.parametrize("other_images", [False, True])
def test_padding_is_never_looked_at(other_images: bool) -> None:
    b = batch(6, (2, 2), 3)
    loss = PatchLocalizationLoss(other_images=other_images)
    dirty = [b["patches"], b["texts"].masked_fill(~b["mask"][..., None], float("nan")), b["scale"]]
    boxes = b["boxes"].masked_fill(~b["mask"][..., None], float("nan"))
    ours = dense.value_and_gradients(lambda v, t, a: loss(v, t, boxes, a, b["mask"], None, b["ids"]), dirty)
    expected = dense.value_and_gradients(
        lambda v, t, a: loss(v, t, b["boxes"], a, b["mask"], None, b["ids"]), features(b)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("other_images", [False, True])
@pytest.mark.parametrize("shape", [(3, 2), (3, 0), (0, 2)])
def test_no_text_is_zero_with_a_graph(shape: tuple[int, int], other_images: bool) -> None:
    leaves = [
        torch.zeros(shape[0], 4, 5, requires_grad=True),
        torch.zeros(*shape, 5, requires_grad=True),
        torch.tensor(20.0, requires_grad=True),
    ]
    mask = torch.zeros(shape, dtype=torch.bool)
    loss = PatchLocalizationLoss(other_images=other_images)
    value = loss(leaves[0], leaves[1], torch.zeros(*shape, 4), leaves[2], mask, None, mask.long())
    assert value.item() == 0
    value.backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in leaves)


@pytest.mark.parametrize("other_images", [False, True])
def test_order_does_not_matter(other_images: bool) -> None:
    b = batch(5, (2, 3), 4)
    loss = PatchLocalizationLoss(other_images=other_images)
    images, texts = torch.randperm(5), torch.randperm(4)
    moved = [b[name][images][:, texts] for name in ("texts", "boxes", "mask", "ids")]
    torch.testing.assert_close(
        loss(b["patches"][images], moved[0], moved[1], b["scale"], moved[2], (2, 3), moved[3]),
        loss(b["patches"], b["texts"], b["boxes"], b["scale"], b["mask"], (2, 3), b["ids"]),
    )


def test_operator_passes_opcheck_and_compiles() -> None:
    b = batch(3, (2, 2), 2)
    leaves = [each.requires_grad_() for each in features(b)]
    spans = patch_spans(b["boxes"], (2, 2))
    for other_images in (False, True):
        torch.library.opcheck(
            torch.ops.cllip_fast.localization.default,
            (*leaves, spans, b["mask"], b["ids"], [2, 2], other_images, "", "auto"),
        )
    loss = PatchLocalizationLoss(other_images=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    arguments = (b["patches"], b["texts"], b["boxes"], b["scale"], b["mask"], None, b["ids"])
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))


def several_ranks(rank: int, world_size: int) -> None:
    b = batch(9, (2, 3), 3)
    b["mask"][6:] = False
    for counts in ((4, 5), (6, 3), (9, 0)):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        home = torch.arange(2).repeat_interleave(torch.tensor(counts))
        for other_images in (False, True):
            expected, expected_grads = dense.value_and_gradients(
                lambda v, t, a, other_images=other_images, home=home: dense_local.localization(
                    v, t, b["boxes"], a, b["mask"], (2, 3), other_images=other_images, ids=b["ids"], local=home
                ),
                features(b),
            )
            loss = PatchLocalizationLoss(other_images=other_images, group=dist.group.WORLD)
            value, grads = dense.value_and_gradients(
                lambda v, t, a, loss=loss, own=own: loss(
                    v, t, b["boxes"][own], a, b["mask"][own], (2, 3), b["ids"][own]
                ),
                [b["patches"][own], b["texts"][own], b["scale"]],
            )
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(grads[0], world_size * expected_grads[0][own])
            torch.testing.assert_close(grads[1], world_size * expected_grads[1][own])
            torch.testing.assert_close(grads[2], expected_grads[2])


def test_several_ranks() -> None:
    on_ranks(2, several_ranks)


def test_bad_inputs() -> None:
    v, t, boxes, mask = torch.zeros(4, 6, 3), torch.zeros(4, 2, 3), torch.zeros(4, 2, 4), torch.ones(4, 2).bool()
    loss = PatchLocalizationLoss()
    assert set(loss(v, t, boxes, 1.0, patch_grid=(2, 3), output_dict=True)) == {"localization_loss"}
    with pytest.raises(
        InputError, match=r"patch_grid is None and 6 patches make no square, expected \(rows, columns\)"
    ):
        loss(v, t, boxes, 1.0)
    with pytest.raises(InputError, match="patch_grid is 2 × 2, expected a grid of 6 patches"):
        loss(v, t, boxes, 1.0, patch_grid=(2, 2))
    with pytest.raises(InputError, match=r"boxes has shape \[4, 1, 4\], expected \[4, 2, 4\]"):
        loss(v, t, boxes[:, :1], 1.0, patch_grid=(2, 3))
    with pytest.raises(InputError, match=r"text_features has shape \[4, 2, 2\], expected \[4, T, 3\]"):
        loss(v, t[..., :2], boxes, 1.0, patch_grid=(2, 3))
    with pytest.raises(InputError, match=r"mask has shape \[4, 1\], expected \[4, 2\]"):
        loss(v, t, boxes, 1.0, mask[:, :1], (2, 3))
    with pytest.raises(InputError, match=r"group_ids has shape \[4, 1\], expected \[4, 2\]"):
        loss(v, t, boxes, 1.0, mask, (2, 3), mask[:, :1].long())
