"""Presets, configuration, parameter groups."""

from __future__ import annotations

import json

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.models import PRESETS, CllipModel, ModelConfig, create_model, parameter_groups

PARTS = ("region", "grounding", "patch")

# Published sizes of OpenCLIP's models of the same names.
OPEN_CLIP_PARAMETERS = {
    "ViT-B-32": 151_277_313,
    "ViT-B-16": 149_620_737,
    "ViT-L-14": 427_616_513,
    "ViT-H-14": 986_109_441,
}


@pytest.mark.parametrize(("name", "count"), OPEN_CLIP_PARAMETERS.items())
def test_clip_part_has_open_clips_size(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name, region="roi_align", share_logit_scale=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", PRESETS)
def test_forward_shapes(name: str) -> None:
    config = PRESETS[name]
    patches, width, embed = config.patch_grid[0] ** 2, config.vision_width, config.embed_dim
    with torch.device("meta"):
        model = create_model(name)
        images = torch.empty(2, 3, config.image_size, config.image_size)
        text = torch.empty(2, config.text_length, dtype=torch.int64)
        region_text = torch.empty(2, 5, 7, dtype=torch.int64)
        output = model(images, text, torch.empty(2, 5, 4), region_text, parts=PARTS)
        tokens = model.image_tokens(images)
    assert tokens.shape == (2, patches + config.class_token, width)
    shapes = {key: tuple(value.shape) for key, value in output.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "image_features": (2, embed),
        "text_features": (2, embed),
        "logit_scale": (),
        "region_features": (2, 5, embed),
        "region_text_features": (2, 5, embed),
        "region_ids": (2, 5),
        "region_mask": (2, 5),
        "boxes": (2, 5, 4),
        "region_logit_scale": (),
        "predicted_boxes": (2, 5, 4),
        "patch_features": (2, patches, embed),
    }
    assert output["patch_grid"] == config.patch_grid
    assert model.encode_image(images).shape == (2, embed)


def test_tiny_runs_and_says_what_it_is() -> None:
    model = create_model("tiny", vocab_size=100)
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.8e6
    line = model.describe()
    assert "\n" not in line
    for part in ("tiny", "1.46 M parameters", "8×8 patches", "64 px", "of 100 tokens", "prompter"):
        assert part in line
    assert model.encode_image(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_config_round_trip() -> None:
    model = create_model("tiny", image_size=32, vocab_size=50, share_logit_scale=True, region="roi_align")
    stored = json.loads(json.dumps(model.config.to_dict()))
    assert ModelConfig.from_dict(stored) == model.config
    assert stored["image_size"] == 32
    with pytest.raises(AttributeError):
        model.config.image_size = 64


def test_state_dict_round_trip() -> None:
    first, second = (create_model("tiny", image_size=32) for _ in range(2))
    images, text = torch.randn(2, 3, 32, 32), torch.randint(0, 512, (2, 32))
    boxes, region_text = torch.rand(2, 4, 2).repeat(1, 1, 2), torch.randint(0, 512, (2, 4, 6))
    assert not torch.equal(first.encode_image(images), second.encode_image(images))
    second.load_state_dict(first.state_dict())
    one, two = (CllipModel.forward(m, images, text, boxes, region_text, parts=PARTS) for m in (first, second))
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]


def test_logit_scales_start_and_clamp() -> None:
    model = create_model("tiny")
    for scale in (model.logit_scale, model.region_logit_scale):
        assert scale.shape == ()
        assert scale.exp().item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(9.0)
    model.region_logit_scale.data.fill_(-3.0)
    model.clamp_logit_scales()
    assert model.logit_scale.exp().item() == pytest.approx(100)
    assert model.region_logit_scale.item() == 0


def test_parameter_groups() -> None:
    model = create_model("ViT-Ti-16", vision_depth=1, text_depth=1, vocab_size=40)
    decay, rest = parameter_groups(model, 0.2)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decay, rest))
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    for name in ("visual.positions", "visual.class_token", "text.positions", "text.tokens.weight", "logit_scale"):
        assert name in kept
    assert {"visual.stem.weight", "text.project.weight", "prompter.qkv.weight"} <= decayed
    model.visual.stem.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.2)[0]["params"]) == len(decay["params"]) - 1
    with pytest.raises(InputError, match=r"weight_decay is -1"):
        parameter_groups(model, -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-X"}, r"model is 'ViT-X', expected one of tiny, ViT-Ti-16, .*ViT-H-14"),
        ({"dept": 3}, r"unknown model options dept, expected among .*vision_depth"),
        ({"image_size": 60}, r"image_size is 60, expected a multiple of patch_size 8"),
        ({"image_size": 0}, r"image_size is 0, expected a positive integer"),
        ({"vocab_size": 12.5}, r"vocab_size is 12.5, expected a positive integer"),
        ({"share_logit_scale": 1}, r"share_logit_scale is 1, expected true or false"),
        ({"mlp_ratio": 0}, r"mlp_ratio is 0, expected a positive number"),
        ({"patch_size": 16}, r"patch_size is 16, expected 8 with stem='conv'"),
        ({"vision_heads": 3}, r"vision_width is 128, expected a multiple of vision_heads 3"),
        ({"vision_width": 6, "vision_heads": 2}, r"vision_width is 6, expected a multiple of 4"),
        ({"region": "crop"}, r"region is 'crop', expected one of prompter, roi_align"),
        ({"attention": "fast"}, r"attention is 'fast', expected one of sdpa, matmul, flash, fa3, fa4, xformers"),
        ({"prompter_pool": "none"}, r"prompter_pool is 'none', expected one of all, prompt"),
        ({"stem": "none"}, r"stem is 'none', expected one of patch, conv"),
    ],
)
def test_bad_options(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(**({"name": "tiny"} | arguments))


def test_incomplete_config() -> None:
    with pytest.raises(InputError, match=r"incomplete: .*embed_dim"):
        ModelConfig.from_dict({"name": "mine"})


@pytest.mark.parametrize(("attention", "package"), [("flash", "flash-attn"), ("xformers", "xformers")])
def test_absent_attention_packages_are_refused(attention: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllip_fast.extras.probe", lambda name: None)
    with pytest.raises(InputError, match=f"attention='{attention}' needs {package}"):
        create_model("tiny", attention=attention)
