"""OpenCLIP's weights come in and ours go out; the same model computes the same on both sides."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.interchange import export, load_pretrained
from cllip_fast.models import create_model
from cllip_fast.models.cllip import TOWERS
from tests.interchange.peers import (
    EOT,
    LENGTH,
    Outputs,
    inputs,
    openclip_b32,
    openclip_cases,
    openclip_reads,
    our_outputs,
    randomize,
    small_model,
)
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip_torch is not installed"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outputs]]:
    """A folder of OpenCLIP's files and, by case, what OpenCLIP computes."""
    folder = tmp_path_factory.mktemp("openclip")
    return folder, on_ranks(1, openclip_cases, str(folder))[0]


def same(ours: Outputs, theirs: Outputs) -> None:
    """Equal to the rounding of fp32; and not trivially so."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert theirs["logits"].std() > 0.1


@pytest.mark.parametrize(
    ("file", "case", "options"),
    [
        ("plain.pt", "plain", {}),
        ("trained.pt", "plain", {}),
        ("plain.safetensors", "plain", {}),
        ("plain.pt", "plain", {"attention": "matmul", "region": "roi_align"}),
        ("half.pt", "half", {}),
        ("custom.pt", "custom", {}),
        ("quick", "quick", {"name": "ViT-B-32-quickgelu"}),
        ("quick/open_clip_pytorch_model.bin", "quick", {"quick_gelu": True}),
        ("plain.pt", "larger", {"image_size": 40, "text_length": 12}),
        ("plain.pt", "smaller", {"image_size": 16}),
    ],
)
def test_the_same_features_and_logits(file: str, case: str, options: dict, files: tuple) -> None:
    folder, outputs = files
    model = small_model(**options)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    said = load_pretrained(model, folder / file)
    same(our_outputs(model), outputs[case])
    assert str(folder) in said
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith(("prompter.", "region_logit_scale")), name
    assert ("fresh: Prompter, grounding head" in said) is (model.prompter is not None)
    assert ("positions interpolated from 3×3" in said) is (case in ("larger", "smaller"))


def test_texts_that_fit_a_shorter_table_keep_their_features(files: tuple) -> None:
    folder, outputs = files
    model = small_model(text_length=6)  # as long as the longest of the inputs
    assert f"the first 6 of {LENGTH} text positions" in load_pretrained(model, folder / "plain.pt")
    _, text = inputs()
    torch.testing.assert_close(model.encode_text(text[:, :6]), outputs["plain"]["text"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("plain.pt", {"vision_depth": 3}, r"vision_depth is 2 there, 3 here\. It seems to be no preset's model"),
        ("plain.pt", {"patch_size": 4}, r"patch_size is 8 there, 4 here"),
        ("plain.pt", {"vocab_size": 60}, r"vocab_size is 50 there, 60 here; texts need the tokenizer"),
        ("plain.pt", {"mlp_ratio": 2.0}, r"vision_hidden is 64 there, 32 here; text_hidden is 32 there, 16 here"),
        ("quick", {}, r"quick_gelu is True there, False here"),
        ("quick", {"quick_gelu": True, "text_heads": 4}, r"text_heads is 2 there, 4 here"),
    ],
)
def test_another_model_is_refused(file: str, options: dict, message: str, files: tuple) -> None:
    with pytest.raises(InputError, match=message):
        load_pretrained(small_model(**options), files[0] / file)


@pytest.mark.slow
def test_a_whole_vit_b_32(tmp_path: Path) -> None:
    path = tmp_path / "b32.pt"
    outputs = on_ranks(1, openclip_b32, str(path))[0]
    with torch.device("meta"):
        other = create_model("ViT-B-16")
    fitting = "ViT-B-32 or ViT-B-32-quickgelu"
    with pytest.raises(InputError, match=rf"patch_size is 32 there, 16 here\. It seems to be {fitting}$"):
        load_pretrained(other, path)
    model = create_model("ViT-B-32")
    load_pretrained(model, path)
    path.unlink()
    with torch.no_grad():
        torch.testing.assert_close(our_outputs(model), outputs, rtol=1e-4, atol=2e-5)


def test_openclip_loads_what_is_exported(tmp_path: Path) -> None:
    models = {
        "clip": (small_model(), EOT),
        "quick": (small_model("ViT-B-32-quickgelu", region="roi_align", share_logit_scale=True), EOT),
        "own tokenizer": (small_model(), 1),
    }
    for name, (model, end_id) in models.items():
        randomize(model)
        said = export(model, tmp_path / name, "openclip", end_id=end_id)
        assert ("the Prompter has no place there" in said) is (model.prompter is not None)
    folders = {str(tmp_path / name): end_id for name, (_, end_id) in models.items()}
    theirs = on_ranks(1, openclip_reads, folders)[0]
    for (model, end_id), outputs in zip(models.values(), theirs, strict=True):
        same(our_outputs(model, end_id), outputs)


@pytest.mark.parametrize("file", ["clip", "clip/open_clip_model.safetensors"])
def test_what_is_exported_comes_back(file: str, tmp_path: Path) -> None:
    first, second = small_model(quick_gelu=True), small_model(quick_gelu=True)
    randomize(first)
    export(first, tmp_path / "clip", "openclip", end_id=1)
    load_pretrained(second, tmp_path / file)
    for name, x in second.state_dict().items():
        assert torch.equal(x, first.state_dict()[name]) is name.startswith(TOWERS), name


def test_weights_of_other_pixels_are_announced(tmp_path: Path) -> None:
    """The trainer normalises by CLIP's mean: who starts from weights that know another one is told."""
    model = small_model(region="roi_align")
    export(model, tmp_path, "openclip", end_id=EOT)
    assert "WARNING" not in load_pretrained(model, tmp_path)
    config = tmp_path / "open_clip_config.json"
    values = json.loads(config.read_text()) | {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    config.write_text(json.dumps(values))
    assert "WARNING: they know pixels of mean (0.5, 0.5, 0.5)" in load_pretrained(model, tmp_path)
    config.write_text(json.dumps(values | {"preprocess_cfg": {"resize_mode": "squash"}}))
    assert "WARNING: " in load_pretrained(model, tmp_path)
