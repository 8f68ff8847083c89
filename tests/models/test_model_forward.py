"""The public verbs and `forward`: agreement with each other, padding, gradients, ids, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cllip_fast.errors import InputError
from cllip_fast.models.text_ids import hash_multipliers, text_ids

PARTS = ("region", "grounding", "patch")
CLIP_LIKE = {"stem": "patch", "class_token": True, "causal_text": True, "attention": "sdpa", "prompter_pool": "all"}
KINDS = pytest.mark.parametrize("options", [{}, CLIP_LIKE, {"prompter_pool": "all"}], ids=["tiny", "clip", "all"])


@KINDS
def test_forward_is_made_of_the_verbs(mini, inputs, options: dict[str, object]) -> None:
    model = mini(**options)
    output = model(*inputs.arguments(), parts=PARTS)
    tokens = model.image_tokens(inputs.images)
    region_texts = model.encode_text(inputs.region_text.flatten(0, 1), normalize=True).unflatten(0, (3, 5))
    expected = {
        "image_features": model.encode_image(inputs.images, normalize=True),
        "text_features": model.encode_text(inputs.text, normalize=True),
        "region_features": model.encode_regions(tokens, inputs.boxes, normalize=True),
        "region_text_features": region_texts,
        "patch_features": model.encode_patches(tokens, normalize=True),
        "predicted_boxes": model.ground(tokens, region_texts),
        "logit_scale": model.logit_scale.exp(),
        "region_logit_scale": model.region_logit_scale.exp(),
    }
    for key, value in expected.items():
        torch.testing.assert_close(output[key], value)
        if key.endswith("features"):
            torch.testing.assert_close(value.norm(dim=-1), torch.ones_like(value[..., 0]))
    assert output["boxes"] is inputs.boxes
    assert output["region_mask"] is inputs.region_mask
    assert output["patch_grid"] == (3, 3)


def test_patch_features_average_to_the_image_feature(mini, inputs) -> None:
    model = mini()
    patches = model.encode_patches(model.image_tokens(inputs.images))
    torch.testing.assert_close(patches.mean(1), model.encode_image(inputs.images))


def test_class_token_is_the_image_feature(mini, inputs) -> None:
    model = mini(**CLIP_LIKE)
    tokens = model.image_tokens(inputs.images)
    expected = model.visual.project(model.visual.norm_out(tokens[:, 0]))
    torch.testing.assert_close(model.pool_image(tokens), expected)
    torch.testing.assert_close(
        model.encode_patches(tokens)[:, 4], model.visual.project(model.visual.norm_out(tokens[:, 5]))
    )


@pytest.mark.parametrize("parts", [(), ("region",), ("grounding",), ("patch",), PARTS])
def test_image_is_encoded_once_and_only_what_is_asked_for_is_computed(mini, inputs, parts: tuple[str, ...]) -> None:
    model = mini()
    calls = {"stem": 0, "text": 0, "box_head": 0}
    for name, module in (
        ("stem", model.visual.stem),
        ("text", model.text),
        ("box_head", model.prompter.box_head),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    output = model(*inputs.arguments(), parts=parts)
    assert calls == {"stem": 1, "text": 2 if parts else 1, "box_head": int("grounding" in parts)}
    keys = {"region_features": "region", "predicted_boxes": "grounding", "patch_features": "patch"}
    assert {key for key in keys if key in output} == {key for key, part in keys.items() if part in parts}
    assert ("region_ids" in output) == bool(parts)


@KINDS
def test_padded_regions_are_finite_and_change_no_other(mini, inputs, options: dict[str, object]) -> None:
    model = mini(**options)
    output = model(*inputs.arguments(), parts=PARTS)
    assert all(value.isfinite().all() for value in output.values() if isinstance(value, torch.Tensor))
    inputs.boxes[0, 4] = 0.5
    inputs.region_text[0, 4] = 3
    changed = model(*inputs.arguments(), parts=PARTS)
    for key in ("region_features", "region_text_features", "predicted_boxes", "region_ids"):
        assert torch.equal(changed[key][inputs.region_mask], output[key][inputs.region_mask])
        assert not torch.equal(changed[key][0, 4], output[key][0, 4])


def test_regions_may_be_absent_altogether(mini, inputs) -> None:
    images, text, boxes, region_text, mask = inputs.arguments()
    output = mini()(images, text, boxes[:, :0], region_text[:, :0], mask[:, :0], parts=PARTS)
    assert output["region_features"].shape == (3, 0, 12)
    assert output["predicted_boxes"].shape == (3, 0, 4)
    everything = mini()(images, text, boxes, region_text, parts=PARTS)
    assert everything["region_mask"].all()
    torch.testing.assert_close(everything["image_features"], output["image_features"])


@KINDS
@pytest.mark.parametrize("share", [False, True])
def test_gradient_reaches_every_parameter(mini, inputs, options: dict[str, object], share: bool) -> None:
    model = mini(share_logit_scale=share, **options)
    output = model(*inputs.arguments(), parts=PARTS)
    torch.manual_seed(2)
    total = sum(
        (value * torch.randn_like(value)).sum()
        for value in output.values()
        if isinstance(value, torch.Tensor) and value.requires_grad
    )
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("region", "parts"),
    [("roi_align", parts) for parts in ((), ("region",), ("patch",), ("region", "patch"))]
    + [("prompter", parts) for parts in ((), ("region",), ("grounding",), ("patch",), ("region", "grounding"), PARTS)],
)
def test_freeze_unused_leaves_exactly_what_gets_a_gradient(mini, inputs, region: str, parts: tuple[str, ...]) -> None:
    model = mini(region=region)
    frozen = model.freeze_unused(parts)
    output = model(*inputs.arguments(), parts=parts)
    if "region" not in parts and "patch" not in parts:
        output.pop("region_logit_scale", None)  # no loss of the grounding part alone uses it
    sum(v.sum() for v in output.values() if isinstance(v, torch.Tensor) and v.requires_grad).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]


def test_shared_logit_scale(mini, inputs) -> None:
    model = mini(share_logit_scale=True)
    output = model(*inputs.arguments(), parts=("region",))
    assert "region_logit_scale" not in model.state_dict()
    assert output["region_logit_scale"].item() == output["logit_scale"].item() == model.logit_scale.exp().item()
    model.clamp_logit_scales()


def test_region_ids_are_equal_exactly_for_equal_texts(mini, inputs) -> None:
    model = mini()
    torch.manual_seed(3)
    inputs.region_text = torch.randint(0, 3, (3, 5, 4))  # few different tokens: many near misses, some equal rows
    inputs.region_text[2, 1] = inputs.region_text[0, 3]
    rows = inputs.region_text.flatten(0, 1)
    ids = model(*inputs.arguments(), parts=("region",))["region_ids"].flatten()
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, None] == ids, (rows[:, None] == rows).all(-1))


def test_text_ids_depend_on_nothing_but_the_tokens() -> None:
    tokens = torch.cartesian_prod(*[torch.arange(12)] * 4)
    ids = text_ids(tokens, hash_multipliers(77))
    assert len(ids.unique()) == len(tokens)
    assert torch.equal(text_ids(F.pad(tokens, (0, 9)), hash_multipliers(20)), ids)  # padded further, another model
    # Fixed numbers: ids computed by different processes, versions and machines agree.
    assert hash_multipliers(2).tolist() == [-2152535657050944081, 7960286522194355701]
    assert text_ids(torch.tensor([2, 1]), hash_multipliers(2)).item() == 2 * -2152535657050944081 + 7960286522194355701


@pytest.mark.parametrize("options", [{}, CLIP_LIKE], ids=["tiny", "clip"])
def test_bfloat16_autocast(mini, inputs, options: dict[str, object]) -> None:
    model = mini(**options).float()
    arguments = [x.float() if x.is_floating_point() else x for x in inputs.arguments()]
    exact = model(*arguments, parts=PARTS)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*arguments, parts=PARTS)
    assert output["predicted_boxes"].dtype == torch.float32
    for key, value in exact.items():
        if key.endswith(("features", "boxes")):
            torch.testing.assert_close(output[key].float(), value, atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i, t: m.encode_image(i.images[..., :16]), r"images has shape \[3, 3, 24, 16\], expected .*24, 24\]"),
        (lambda m, i, t: m.image_tokens(torch.zeros(1, 3, 32, 32)), r"images has shape .*expected \[B, 3, 24, 24\]"),
        (
            lambda m, i, t: m.encode_image(i.images.to(torch.uint8)),
            r"images has dtype torch.uint8, expected a floating",
        ),
        (lambda m, i, t: m.encode_image([1]), r"images must be a tensor, got list"),
        (lambda m, i, t: m.encode_image(i.images.to("meta")), r"images is on meta, but the model is on cpu"),
        (lambda m, i, t: m.encode_text(F.pad(i.text, (0, 4))), r"text has 13 tokens a text, expected 1 to 12"),
        (lambda m, i, t: m.encode_text(i.text[:, :0]), r"text has 0 tokens a text, expected 1 to 12"),
        (lambda m, i, t: m.encode_text(i.text + 29), r"text holds token \d+, expected ids from 0 to 29"),
        (lambda m, i, t: m.encode_text(i.text - 1), r"text holds token -1, expected ids from 0 to 29"),
        (lambda m, i, t: m.encode_text(i.text.int()), r"text has dtype torch.int32, expected torch.int64"),
        (lambda m, i, t: m.encode_text(i.text[0]), r"text has shape \[9\], expected \[B, L\]"),
        (lambda m, i, t: m.pool_image(t[:, 1:]), r"image_tokens has shape \[3, 8, 16\], expected \[B, 9, 16\]"),
        (lambda m, i, t: m.encode_patches(t[..., :8]), r"image_tokens has shape \[3, 9, 8\], expected \[B, 9, 16\]"),
        (lambda m, i, t: m.encode_regions(t, i.boxes[0]), r"boxes has shape \[5, 4\], expected \[3, M, 4\]"),
        (lambda m, i, t: m.encode_regions(t, i.boxes[..., :2]), r"boxes has shape \[3, 5, 2\], expected \[3, M, 4\]"),
        (lambda m, i, t: m.encode_regions(t, i.boxes[:2]), r"boxes has shape \[2, 5, 4\], expected \[3, M, 4\]"),
        (
            lambda m, i, t: m.encode_regions(t, 24 * i.boxes),
            r"boxes run from 0 to \d.*shares of the image, in \[0, 1\]",
        ),
        (lambda m, i, t: m.encode_regions(t, i.boxes * torch.nan), r"boxes run from nan to nan, expected"),
        (lambda m, i, t: m.ground(t, torch.zeros(3, 12)), r"text_features has shape \[3, 12\], expected \[3, K, 12\]"),
        (
            lambda m, i, t: m(*i.arguments(), parts=("regions",)),
            r"parts is 'regions', expected one of region, grounding",
        ),
        (lambda m, i, t: m(i.images, i.text, parts=("patch",)), r"parts patch need boxes and region_text, got None"),
        (lambda m, i, t: m(i.images, i.text[:2]), r"text has shape \[2, 9\], expected \[3, L\]"),
        (
            lambda m, i, t: m(i.images, i.text, i.boxes, i.region_text[:, :2], parts=PARTS),
            r"region_text has shape \[3, 2, 4\], expected \[3, 5, Lr\]",
        ),
        (
            lambda m, i, t: m(i.images, i.text, i.boxes, i.region_text, i.region_mask.long(), parts=PARTS),
            r"region_mask has dtype torch.int64, expected torch.bool",
        ),
    ],
)
def test_bad_input(mini, inputs, call, message: str) -> None:
    model = mini()
    with pytest.raises(InputError, match=message):
        call(model, inputs, model.image_tokens(inputs.images))


def test_roi_align_model_has_no_grounding(mini, inputs) -> None:
    model = mini(region="roi_align")
    message = r"grounding needs the Prompter, but the model was built with region='roi_align'"
    with pytest.raises(InputError, match=message):
        model.ground(model.image_tokens(inputs.images), torch.zeros(3, 1, 12, dtype=torch.float64))
    with pytest.raises(InputError, match=message):
        model(*inputs.arguments(), parts=("grounding",))
    assert model(*inputs.arguments(), parts=("region", "patch"))["region_features"].shape == (3, 5, 12)
