"""Hugging Face's CLIP weights come in and ours go out; the same model computes the same on both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.interchange import export, load_pretrained
from tests.interchange.peers import (
    EOT,
    HF_TEXT,
    HF_VISION,
    LENGTH,
    SIZE,
    Outputs,
    inputs,
    our_outputs,
    randomize,
    small_model,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def build(activation: str = "quick_gelu") -> torch.nn.Module:
    vision, text = (config | {"hidden_act": activation} for config in (HF_VISION, HF_TEXT))
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    randomize(model)
    return model


@torch.no_grad()
def hf_outputs(model: torch.nn.Module, end_id: int = EOT) -> Outputs:
    images, text = inputs(SIZE, LENGTH, end_id)
    return {
        "image": model.get_image_features(images).pooler_output,
        "text": model.get_text_features(text).pooler_output,
        "logits": model(input_ids=text, pixel_values=images).logits_per_image,
    }


def same(ours: Outputs, theirs: Outputs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert theirs["logits"].std() > 0.1


@pytest.mark.parametrize(("activation", "preset"), [("quick_gelu", "ViT-B-32-quickgelu"), ("gelu", "ViT-B-32")])
def test_the_same_features_and_logits(activation: str, preset: str, tmp_path: Path) -> None:
    theirs = build(activation)
    theirs.save_pretrained(tmp_path)
    model = small_model(preset)
    said = load_pretrained(model, tmp_path)
    assert "Hugging Face's" in said
    assert "fresh: Prompter, grounding head, region temperature" in said
    same(our_outputs(model), hf_outputs(theirs))


def test_old_files_with_position_ids(tmp_path: Path) -> None:
    theirs = build()
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("vision", "text")}
    torch.save(theirs.state_dict() | ids, tmp_path / "pytorch_model.bin")
    model = small_model(quick_gelu=True)
    load_pretrained(model, tmp_path)
    same(our_outputs(model), hf_outputs(theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["text_config"].update(num_attention_heads=4), r"text_heads is 4 there, 2 here"),
        (lambda config: config["vision_config"].update(hidden_act="gelu"), r"hidden_act \['gelu', 'quick_gelu'\]"),
        (lambda config: config["text_config"].update(layer_norm_eps=1e-6), r"layer_norm_eps 1e-06, expected 1e-05"),
        (lambda config: config.update(model_type="siglip"), r"is of a 'siglip' model, expected 'clip'"),
        (lambda config: config.update(text_config_dict={"num_attention_heads": 1}), r"text_heads is 1 there"),
    ],
)
def test_a_configuration_of_another_model_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_pretrained(small_model(quick_gelu=True), tmp_path)


@pytest.mark.parametrize("preset", ["ViT-B-32", "ViT-B-32-quickgelu"])
@pytest.mark.parametrize("end_id", [EOT, 1])
def test_transformers_loads_what_is_exported(preset: str, end_id: int, tmp_path: Path) -> None:
    model, again = small_model(preset), small_model(preset)
    randomize(model)
    said = export(model, tmp_path, "hf", end_id=end_id)
    assert "the Prompter has no place there" in said
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    same(our_outputs(model, end_id), hf_outputs(theirs.eval(), end_id))
    load_pretrained(again, tmp_path)
    same(our_outputs(again, end_id), our_outputs(model, end_id))
