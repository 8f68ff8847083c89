"""What is refused, and how it is named; our own files; the command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cllip_fast.data import train_bpe
from cllip_fast.errors import InputError
from cllip_fast.interchange import add_commands, export, load_model, load_pretrained
from cllip_fast.models import create_model
from tests.interchange.peers import randomize, small_model


def openclip_state() -> dict[str, Tensor]:
    """A small OpenCLIP state dict, by our own export."""
    from cllip_fast.interchange import openclip
    from cllip_fast.interchange.keymap import to_peer

    model = small_model()
    return to_peer(model.state_dict(), openclip.names(model.config.vision_depth, model.config.text_depth))


def refused(state: object, tmp_path: Path) -> str:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(InputError) as error:
        load_pretrained(small_model(), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("visual.trunk.attn_pool.latent", "SigLIP model with timm's"),
        ("visual.trunk.stages.0.blocks.0.gamma", "ConvNeXt"),
        ("visual.trunk.blocks.0.attn.qkv.weight", "image tower of timm"),
        ("visual.layer1.0.conv1.weight", "ResNet"),
        ("text_decoder.text_projection", "CoCa"),
        ("visual.attn_pool.query", "CoCa"),
        ("text.transformer.embeddings.word_embeddings.weight", "text tower of Hugging Face"),
        ("vision_model.head.probe", "SigLIP model of Hugging Face"),
        ("logit_bias", "SigLIP-type"),
        ("visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
        ("transformer.resblocks.0.attn.ln_q.weight", "custom attention"),
    ],
)
def test_other_models_are_named(key: str, name: str, tmp_path: Path) -> None:
    message = refused(openclip_state() | {key: torch.zeros(3)}, tmp_path)
    assert name in message
    assert "CllipModel cannot be" in message


def test_a_vit_without_the_first_norm_is_named(tmp_path: Path) -> None:
    state = openclip_state()
    del state["visual.ln_pre.weight"], state["visual.ln_pre.bias"]
    assert "CLIPA" in refused(state, tmp_path)


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    state = openclip_state()
    state["visual.extra"] = state.pop("visual.transformer.resblocks.1.ln_2.bias")
    message = refused(state, tmp_path)
    assert "lacks visual.transformer.resblocks.1.ln_2.bias" in message
    assert "also holds visual.extra" in message


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    state = openclip_state()
    state["visual.ln_post.bias"] = torch.zeros(7)
    assert "visual.norm_out.bias [7] instead of [16]" in refused(state, tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no state dict"),
        ([torch.zeros(2)], "no state dict"),
        ({"state_dict": {"a": 3}}, "no state dict"),
        ({"encoder.weight": torch.zeros(2)}, "no CLIP model that is known: encoder.weight"),
        ({"state_dict": Path("x")}, "cannot be read"),  # a class that weights_only refuses
    ],
)
def test_files_of_other_kinds_are_refused(state: object, message: str, tmp_path: Path) -> None:
    assert message in refused(state, tmp_path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.pt does not exist"):
        load_pretrained(small_model(), tmp_path / "absent.pt")
    with pytest.raises(InputError, match=r"holds none of open_clip_model\.safetensors"):
        load_pretrained(small_model(), tmp_path)
    for name in ("half.pt", "half.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(InputError, match=rf"{name} cannot be read"):
            load_pretrained(small_model(), tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_not_run(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(InputError, match="TorchScript program, as OpenAI published"):
        load_pretrained(small_model(), tmp_path / "ViT-B-32.pt")


def test_the_preset_that_fits_is_named(tmp_path: Path) -> None:
    model = create_model("ViT-Ti-16", vocab_size=64)
    torch.save({"model": model.state_dict(), "model_config": model.config.to_dict()}, tmp_path / "own.pt")
    with pytest.raises(InputError, match=r"embed_dim is 192 there, 384 here.*It seems to be ViT-Ti-16$"):
        load_pretrained(create_model("ViT-S-16", vocab_size=64), tmp_path / "own.pt")


@pytest.mark.parametrize("preset", ["tiny", "ViT-B-32"])
def test_safetensors_keep_the_whole_model(preset: str, tmp_path: Path) -> None:
    model = create_model("tiny", image_size=32, vocab_size=40) if preset == "tiny" else small_model()
    randomize(model)
    export(model, tmp_path, "safetensors")
    again = load_model(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    without = create_model(**(model.config.to_dict() | {"region": "roi_align", "name": preset, "attention": "sdpa"}))
    assert "the Prompter left out" in load_pretrained(without, tmp_path)
    assert torch.equal(without.visual.norm_out.bias, model.visual.norm_out.bias)


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (9, 10):
        model = small_model()
        randomize(model)
        model.logit_scale.data.fill_(step)
        saved = {"model": model.state_dict(), "model_config": model.config.to_dict()}
        torch.save(saved, tmp_path / "checkpoints" / f"step_{step}.pt")
    assert load_model(tmp_path).logit_scale.item() == 10


def test_our_own_files_are_checked_too(tmp_path: Path) -> None:
    model = small_model(region="roi_align")
    saved = {"model": model.state_dict(), "model_config": model.config.to_dict()}
    torch.save(saved, tmp_path / "own.pt")
    # Without a Prompter in the file it does not matter how this one's pools.
    assert "fresh: Prompter" in load_pretrained(small_model(prompter_pool="prompt"), tmp_path / "own.pt")
    with pytest.raises(InputError, match="quick_gelu is False there, True here"):
        load_pretrained(small_model(quick_gelu=True), tmp_path / "own.pt")
    del saved["model"]["text.positions"]
    torch.save(saved, tmp_path / "own.pt")
    with pytest.raises(InputError, match=r"text\.positions nothing instead of \[9, 8\]"):
        load_pretrained(small_model(), tmp_path / "own.pt")
    torch.save(openclip_state(), tmp_path / "theirs.pt")
    with pytest.raises(InputError, match="is not of this package"):
        load_model(tmp_path / "theirs.pt")


def test_models_that_are_not_clips_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny cannot be exported to hf.*stem is 'conv', class_token is False"):
        export(create_model("tiny"), tmp_path, "hf")
    with pytest.raises(InputError, match="to is 'gguf', expected one of openclip, hf, onnx, safetensors"):
        export(create_model("tiny"), tmp_path, "gguf")
    with pytest.raises(InputError, match="end_id is None and the vocabulary of 50 is not CLIP's"):
        export(small_model(), tmp_path, "openclip")
    with pytest.raises(InputError, match="end_id is 50, expected an id from 1 to 49"):
        export(small_model(), tmp_path, "openclip", end_id=50)
    with pytest.raises(InputError, match="end_id is 2, which transformers takes for"):
        export(small_model(), tmp_path, "hf", end_id=2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_bpe(["a red circle", "a blue square"], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = small_model(vocab_size=tokenizer.vocab_size)
    checkpoint = tmp_path / "step_00000003.pt"
    torch.save({"model": model.state_dict(), "model_config": model.config.to_dict(), "step": 3}, checkpoint)
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())

    def run(arguments: list[str]) -> None:
        options = parser.parse_args(arguments)
        options.run(options)

    command = ["export", str(checkpoint), "--to", "openclip", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"the tokenizer's end-of-text id \(--tokenizer\)"):
        run(command)
    run([*command, "--tokenizer", str(tmp_path / "tokenizer.json")])
    assert "open_clip_model.safetensors" in capsys.readouterr().out
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert torch.equal(written["visual.proj"], model.visual.project.weight.T)
    assert f'"eos_id": {tokenizer.end_id}' in (tmp_path / "out" / "open_clip_config.json").read_text()
