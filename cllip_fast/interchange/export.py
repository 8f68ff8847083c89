"""A model as files that OpenCLIP, Hugging Face's transformers, ONNX runtimes or safetensors readers load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from safetensors.torch import save_file
from torch import Tensor

from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD
from cllip_fast.errors import InputError, check_choice
from cllip_fast.interchange import hf, onnx, openclip
from cllip_fast.interchange.files import METADATA
from cllip_fast.interchange.keymap import to_peer
from cllip_fast.models import CllipModel, ModelConfig
from cllip_fast.models.cllip import TOWERS

FORMATS = ("openclip", "hf", "onnx", "safetensors")
CLIP_VOCABULARY = 49408  # ids of CLIP's tokenizer; the highest is its end-of-text token


def export(model: CllipModel, folder: str | Path, to: str, *, end_id: int | None = None) -> str:
    """Write `model` into `folder`; returns one line that says what was written and what was left out.

        openclip     open_clip.create_model("local-dir:FOLDER")
        hf           transformers.CLIPModel.from_pretrained("FOLDER")
        onnx         image.onnx and text.onnx: features of unit length, any batch size
        safetensors  load_model("FOLDER"): the whole model, Prompter and all

    Args:
        model: for openclip and hf one of CLIP's architecture (the ViT presets); the Prompter is not theirs.
        folder: made if it does not exist; files of the same names are replaced.
        to: one of the formats above.
        end_id: the tokenizer's end-of-text id, at which openclip and hf pool; default: CLIP's, if the vocabulary is.

    Raises:
        InputError: unknown format, a model that the peer cannot be, an unknown end-of-text id, or absent packages.
    """
    check_choice("to", to, FORMATS)
    folder, config = Path(folder), model.config
    if to == "onnx":
        return onnx.export_onnx(model, folder)
    if to == "safetensors":
        state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
        path = _save(state, folder / "model.safetensors", {METADATA: json.dumps(config.to_dict())})
        return f"wrote {path}"
    _check_is_clip(config, to)
    end_id = _check_end(config, end_id, to)
    if to == "openclip":
        values = openclip.write_config(config, end_id, CLIP_MEAN, CLIP_STD)
        return _export_peer(model, folder, openclip, values)
    return _export_peer(model, folder, hf, hf.write_config(config, end_id))


def _export_peer(model: CllipModel, folder: Path, peer: ModuleType, config: Mapping[str, object]) -> str:
    state = model.state_dict()
    names = peer.names(model.config.vision_depth, model.config.text_depth)
    path = _save(to_peer(state, names), folder / peer.WEIGHTS_FILES[0], {"format": "pt"})
    (folder / peer.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    more = any(not name.startswith(TOWERS) for name in state)
    return f"wrote {path} and {peer.CONFIG_FILE}" + ("; the Prompter has no place there" if more else "")


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata)
    return path


def _check_is_clip(config: ModelConfig, to: str) -> None:
    expected = {"stem": "patch", "class_token": True, "causal_text": True}
    differing = [
        f"{name} is {getattr(config, name)!r}" for name, value in expected.items() if getattr(config, name) != value
    ]
    if differing:
        raise InputError(
            f"{config.name} cannot be exported to {to}, whose models are CLIP's: {', '.join(differing)} "
            f"(expected {', '.join(repr(value) for value in expected.values())}); safetensors and onnx take any model"
        )


def _check_end(config: ModelConfig, end_id: int | None, to: str) -> int:
    if end_id is None:
        if config.vocab_size != CLIP_VOCABULARY:
            raise InputError(
                f"end_id is None and the vocabulary of {config.vocab_size} is not CLIP's: {to} needs the tokenizer's "
                "end-of-text id (--tokenizer)"
            )
        return CLIP_VOCABULARY - 1
    if not 0 < end_id < config.vocab_size:
        raise InputError(f"end_id is {end_id}, expected an id from 1 to {config.vocab_size - 1}")
    if to == "hf" and end_id == 2 != config.vocab_size - 1:
        raise InputError("end_id is 2, which transformers takes for 'the highest id of the text'")
    return end_id
