"""CllipLoss: the paper's combination, its share of images with regions, missing inputs, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.losses import ClipLoss, CllipLoss, GroundingLoss, PatchLocalizationLoss, PatchTextLoss, RegionTextLoss
from cllip_fast.models import create_model
from tests import dense
from tests.ranks import on_ranks

KEYS = ("contrastive_loss", "region_loss", "grounding_loss", "patch_loss", "localization_loss")
LEAVES = (
    "image_features",
    "text_features",
    "logit_scale",
    "region_features",
    "region_text_features",
    "patch_features",
    "predicted_boxes",
    "region_logit_scale",
)


def outputs(images: int, regions: int = 3, patches: int = 4, width: int = 10) -> dict[str, Tensor]:
    """What a model gives: some texts repeat, regions are ragged, the second image has none."""
    generator = torch.Generator().manual_seed(1)

    def unit(count: int, each: int, seed: int) -> Tensor:
        return dense.features(images * each, width, seed=seed)[0].view(images, each, width)

    names, _ = dense.features(6, width, seed=2)
    ids = torch.randint(0, 6, (images, regions), generator=generator)
    mask = torch.rand(images, regions, generator=generator) < 0.7
    mask[0, 0], mask[1:2] = True, False
    corners = torch.rand(2, images, regions, 2, 2, generator=generator, dtype=torch.float64)
    predicted, boxes = corners.sort(-2).values.flatten(-2)
    return {
        "image_features": dense.features(images, width, seed=3)[0],
        "text_features": dense.features(images, width, seed=4)[0],
        "logit_scale": torch.tensor(15.0, dtype=torch.float64),
        "region_features": unit(images, regions, 5),
        "region_text_features": names[ids],
        "patch_features": unit(images, patches, 6),
        "predicted_boxes": predicted,
        "boxes": boxes,
        "region_mask": mask,
        "region_ids": ids,
        "region_logit_scale": torch.tensor(9.0, dtype=torch.float64),
    }


def rows(output: dict[str, Tensor], chosen: slice) -> dict[str, Tensor]:
    return {name: value[chosen] if value.dim() else value for name, value in output.items()}


def value_and_gradients(loss: CllipLoss, output: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parts by name, and the total's gradients by argument."""
    leaves = {name: output[name].clone().requires_grad_() for name in LEAVES}
    parts = loss(**output | leaves, output_dict=True)
    grads = torch.autograd.grad(sum(parts.values()), list(leaves.values()))
    return {name: part.detach() for name, part in parts.items()}, dict(zip(LEAVES, grads, strict=True))


def expected_parts(o: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """All defaults, each part by its own loss (which has its own tests)."""
    local = (o["region_logit_scale"], o["region_mask"])
    return {
        "contrastive_loss": ClipLoss()(o["image_features"], o["text_features"], o["logit_scale"]),
        "region_loss": share
        * RegionTextLoss(filter_threshold=0.9)(
            o["region_features"], o["region_text_features"], *local, o["region_ids"]
        ),
        "grounding_loss": share * GroundingLoss()(o["predicted_boxes"], o["boxes"], o["region_mask"]),
        "patch_loss": share * PatchTextLoss()(o["patch_features"], o["region_text_features"], *local, o["region_ids"]),
        "localization_loss": share
        * PatchLocalizationLoss()(o["patch_features"], o["region_text_features"], o["boxes"], *local),
    }


@pytest.mark.parametrize("without", [0, 1, 3, 6])
def test_combination_and_share_of_images_with_regions(without: int) -> None:
    o = outputs(7)
    o["region_mask"][:] = True
    o["region_mask"][:without] = False
    parts = CllipLoss()(**o, output_dict=True)
    assert tuple(parts) == KEYS
    torch.testing.assert_close(parts, expected_parts(o, (7 - without) / 7))
    torch.testing.assert_close(CllipLoss()(**o), sum(parts.values()), rtol=0, atol=0)


def test_weights_and_options_reach_their_parts() -> None:
    o = outputs(6)
    plain = CllipLoss()(**o, output_dict=True)
    weighted = CllipLoss(local_weight=2.0, patch_weight=3.0, localization_weight=0.5)(**o, output_dict=True)
    for key, weight in zip(KEYS, (1, 2, 2, 3, 0.5), strict=True):
        torch.testing.assert_close(weighted[key], weight * plain[key])
    changes = {
        "filter_threshold": (None, {}),
        "patch_filter_threshold": (0.1, {"patch_loss"}),
        "use_region_ids": (False, {"patch_loss"}),
        "pool": ("softmax", {"patch_loss"}),
        "grounding": ("l1_giou", {"grounding_loss"}),
        "other_images": (True, {"localization_loss"}),
    }
    # Equal texts have equal ids here: without ids, the region loss still has its filter, and the other way round.
    for option, (value, changed) in changes.items():
        parts = CllipLoss(**{option: value})(**o, output_dict=True)
        assert {key for key in KEYS if not torch.isclose(parts[key], plain[key])} == set(changed), option
    neither = CllipLoss(filter_threshold=None, use_region_ids=False)(**o, output_dict=True)
    assert neither["region_loss"] > plain["region_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regions", [3, 0])
def test_no_region_anywhere_is_exactly_clip(regions: int, dtype: torch.dtype) -> None:
    o = outputs(5)
    for name in ("region_features", "region_text_features", "predicted_boxes", "boxes", "region_mask", "region_ids"):
        o[name] = o[name][:, :regions]
    o["region_mask"] = torch.zeros_like(o["region_mask"])
    o = {name: value.to(dtype) if value.is_floating_point() else value for name, value in o.items()}
    parts, grads = value_and_gradients(CllipLoss(), o)
    clip = dense.value_and_gradients(ClipLoss(), [o[name] for name in LEAVES[:3]])
    assert torch.equal(sum(parts.values()), clip[0])
    assert all(torch.equal(grads[name], each) for name, each in zip(LEAVES[:3], clip[1], strict=True))
    assert not any(grads[name].any() for name in LEAVES[3:])
    assert not any(parts[key].item() for key in KEYS[1:])


def test_parts_on_their_own() -> None:
    o = outputs(5)
    plain = CllipLoss()(**o, output_dict=True)
    for name, key in zip(("clip", "region", "grounding", "patch", "localization"), KEYS, strict=True):
        parts = CllipLoss((name,))(**o, output_dict=True)
        assert list(parts) == [key]
        torch.testing.assert_close(parts[key], plain[key])
    loss = CllipLoss(("localization", "clip"))
    assert list(loss(**o, output_dict=True)) == ["contrastive_loss", "localization_loss"]
    assert torch.equal(CllipLoss(("clip",))(**{name: o[name] for name in LEAVES[:3]}), plain["contrastive_loss"])


def test_one_temperature_may_serve_both() -> None:
    o = outputs(5)
    shared = {name: value for name, value in o.items() if name != "region_logit_scale"}
    torch.testing.assert_close(CllipLoss()(**shared), CllipLoss()(**shared, region_logit_scale=o["logit_scale"]))


def test_takes_what_the_model_gives() -> None:
    model = create_model("tiny", vocab_size=50, text_length=8)
    size = model.config.image_size
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0, 0, 0, 0]]] * 3)
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    text = torch.randint(1, 50, (3, 8))
    output = model(
        torch.rand(3, 3, size, size),
        text,
        boxes,
        text[:, None, :5].repeat(1, 2, 1),
        mask,
        parts=("region", "grounding", "patch"),
    )
    parts = CllipLoss()(**output, output_dict=True)
    assert tuple(parts) == KEYS
    assert all(part.isfinite() and part >= 0 for part in parts.values())
    sum(parts.values()).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())


def several_ranks(rank: int, world_size: int) -> None:
    o = outputs(9)
    for counts, empty in (((5, 4), slice(6, 9)), ((6, 3), slice(6, 9)), ((5, 4), slice(0, 9))):
        o["region_mask"] = outputs(9)["region_mask"]
        o["region_mask"][empty] = False  # the second rank's images, where it has 3
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for options in ({}, {"pool": "softmax", "grounding": "l1_giou", "patch_filter_threshold": 0.9}):
            parts, grads = value_and_gradients(CllipLoss(group=dist.group.WORLD, **options), rows(o, own))
            expected, expected_grads = value_and_gradients(CllipLoss(**options), o)
            torch.testing.assert_close(parts, expected)
            for name in LEAVES:
                wanted = expected_grads[name]
                torch.testing.assert_close(grads[name], world_size * wanted[own] if wanted.dim() else wanted)


def test_several_ranks_equal_one() -> None:
    on_ranks(2, several_ranks)


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("clip", ["image_features"]),
        ("clip", ["text_features", "logit_scale"]),
        ("region", ["region_features"]),
        ("region", ["region_text_features"]),
        ("grounding", ["predicted_boxes", "boxes"]),
        ("patch", ["patch_features"]),
        ("localization", ["patch_features", "boxes"]),
    ],
)
def test_missing_inputs_are_named(part: str, missing: list[str]) -> None:
    given = {name: value for name, value in outputs(3).items() if name not in missing}
    with pytest.raises(InputError, match=f"losses asks for '{part}', which needs {', '.join(missing)}: not given"):
        CllipLoss((part,))(**given)


def test_bad_options_and_masks() -> None:
    for losses, message in (
        (("clip", "patches"), "losses is 'patches', expected one of clip, region, grounding, patch, localization"),
        ((), "expected a tuple of some of clip"),
        ("clip", "losses is 'clip', expected a tuple"),
        (("clip", "clip"), "expected each part once"),
    ):
        with pytest.raises(InputError, match=message):
            CllipLoss(losses)
    with pytest.raises(InputError, match=r"patch_weight is -0\.5, expected a number of at least 0"):
        CllipLoss(patch_weight=-0.5)
    with pytest.raises(InputError, match="pool is 'mean'"):
        CllipLoss(pool="mean")
    o = outputs(3)
    with pytest.raises(InputError, match=r"mask has shape \[3, 2\], expected \[3, 3\]"):
        CllipLoss()(**o | {"region_mask": o["region_mask"][:, :2]})
