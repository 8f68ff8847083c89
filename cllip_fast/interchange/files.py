"""Weights files: which format they have, whose model is in them, and its tensors under our names, in fp32."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import safetensors
import torch
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.interchange import hf, openclip
from cllip_fast.interchange.keymap import from_peer, shorten
from cllip_fast.train import checkpoint, sharded_checkpoint

METADATA = "cllip_fast_model"  # the key of the model's configuration in our safetensors files
_WEIGHTS_FILES = (*openclip.WEIGHTS_FILES, *hf.WEIGHTS_FILES)
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile

# A key by which a model is known -> what it is. In this order: a CoCa model has a ViT too.
_OTHER_MODELS = {
    r"visual\.trunk\.attn_pool\.": "a SigLIP model with timm's image tower, pooled by attention",
    r"visual\.trunk\.(stages|stem)\.": "a ConvNeXt model of timm",
    r"visual\.trunk\.": "a model with an image tower of timm",
    r"visual\.(layer1|attnpool)\.": "a CLIP ResNet (RN50 and its like)",
    r"text_decoder\.|visual\.attn_pool\.|text\.cls_emb": "a CoCa model",
    r"text\.transformer\.(embeddings|encoder|shared)\b": "a model with a text tower of Hugging Face",
    r"vision_model\.head\.|text_model\.head\.": "a SigLIP model of Hugging Face",
    r"logit_bias$": "a SigLIP-type model (it has a logit bias)",
    r".*\.ls_[12]\.gamma$": "a ViT with layer scale",
    r".*\.attn\.(ln_q|ln_inner|q_norm|logit_scale)": "a ViT with custom attention",
}


@dataclass(frozen=True)
class Weights:
    """The tensors of one file, fp32 on the CPU, under the names of `CllipModel.state_dict()`."""

    source: str  # for messages: whose weights, and the file
    state: dict[str, Tensor]
    config: dict[str, object]  # fields of ModelConfig that are known beside what the shapes show
    own: bool = False  # written by this package: config is complete, and the Prompter may be in it


def read_weights(path: str | Path) -> Weights:
    """Read a file of OpenCLIP (.pt, .bin, .safetensors), Hugging Face or this package, or a folder with one.

    The folder of a sharded checkpoint of this package counts as one file.

    Configurations that lie beside the weights are read too: without one, heads and activation are not known.

    Raises:
        InputError: no such file, unreadable, of a model that `CllipModel` cannot be, or with keys missing or over.
    """
    path = find_file(Path(path))
    state, config = read_tensors(path)
    if config is not None:
        return Weights(f"the checkpoint {path}", state, dict(config), own=True)
    refuse_other_models(state, path)
    if "vision_model.embeddings.class_embedding" in state:
        return _from_peer(hf, "Hugging Face", state, path)
    if "visual.conv1.weight" in state:
        # The text tower lies under "text." in OpenCLIP's CustomTextCLIP.
        return _from_peer(openclip, "OpenCLIP", {key.removeprefix("text."): x for key, x in state.items()}, path)
    raise InputError(f"{path} holds no CLIP model that is known: {shorten(state)}")


def find_file(path: Path) -> Path:
    """`path`, or the weights in it if it is a folder: somebody's file, or the newest checkpoint of a run."""
    if path.is_file() or sharded_checkpoint.is_folder(path):
        return path
    if not path.exists():
        raise InputError(f"{path} does not exist, expected a file of weights or a folder with one")
    found = find_weights(path) or next(reversed(checkpoint.stored(path / "checkpoints")), None)
    if found is None:
        raise InputError(f"{path} holds none of {', '.join(_WEIGHTS_FILES)}, checkpoints/step_*")
    return found


def find_weights(folder: Path) -> Path | None:
    """The file of OpenCLIP's or Hugging Face's weights in a folder, if it holds one."""
    return next((folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()), None)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, object] | None]:
    """The tensors of a file, floating ones as fp32, and the model's configuration if this package wrote it."""
    if path.is_dir():
        saved = checkpoint.read(path)
        return saved["model"], saved["model_config"]
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                loaded: object = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                stored = (file.metadata() or {}).get(METADATA)
            config = json.loads(stored) if stored else None
        else:
            _refuse_torchscript(path)
            loaded, config = torch.load(path, map_location="cpu", weights_only=True), None
    except InputError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds objects other than tensors and plain values, which are never loaded"
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model_config"), dict):  # a checkpoint of our trainer
        loaded, config = loaded.get("model"), loaded["model_config"]
    elif isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):  # one of OpenCLIP's trainer
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise InputError(f"{path} holds no state dict: tensors by name, or those under 'state_dict'")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): x for key, x in loaded.items()}
    return {key: x.float() if x.is_floating_point() else x for key, x in loaded.items()}, config


def _refuse_torchscript(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise InputError(
                    f"{path} is a TorchScript program, as OpenAI published its weights, and is not run here; "
                    "expected a state dict: load it with open_clip, save model.state_dict()"
                )


def refuse_other_models(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `InputError` that names the model if it is one that `CllipModel` cannot be."""
    for pattern, model in _OTHER_MODELS.items():
        if any(re.match(pattern, key) for key in state):
            raise InputError(f"{path} is {model}, which CllipModel cannot be; expected one of CLIP's ViT models")
    if "visual.conv1.weight" in state and "visual.ln_pre.weight" not in state:
        raise InputError(f"{path} is a ViT without a norm before its blocks (as CLIPA's), which CllipModel cannot be")


def _from_peer(peer: ModuleType, name: str, state: dict[str, Tensor], path: Path) -> Weights:
    source = f"{name}'s {path}"
    state = {key: x for key, x in state.items() if key not in peer.IGNORED}
    depths = (_depth(state, peer.VISION_BLOCK), _depth(state, peer.TEXT_BLOCK))
    ours = from_peer(state, peer.names(*depths), source)
    ours["logit_scale"] = ours["logit_scale"].reshape(())  # some have shape [1]
    config: dict[str, object] = {"stem": "patch", "class_token": True, "causal_text": True}
    beside = path.with_name(peer.CONFIG_FILE)
    if beside.is_file():
        try:
            values = json.loads(beside.read_text())
        except ValueError as error:
            raise InputError(f"{beside} is not JSON: {error}") from error
        config |= peer.read_config(values, str(beside))
    return Weights(source, ours, config)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks there are, by the highest number; one if there are none, so that its keys count as missing."""
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state]
    return max((int(match[1]) + 1 for match in found if match), default=1)
