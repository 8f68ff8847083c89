"""Weights into a model: they must be of its kind; positions are fitted to its image size and text length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.errors import InputError, check_choice
from cllip_fast.interchange.files import Weights, read_weights
from cllip_fast.interchange.keymap import shorten
from cllip_fast.interchange.preprocessing import CLIP, read_preprocessing
from cllip_fast.models import PRESETS, CllipModel, ModelConfig, create_model
from cllip_fast.models.cllip import TOWERS

# What a model may differ in from the one that was saved: names, positions, and what CLIP weights do not touch.
_FREE = {"name", "image_size", "text_length", "region", "attention", "norm", "share_logit_scale"}
_PROMPTER = {"prompter_pool", "prompter_positions"}


def load_pretrained(model: CllipModel, path: str | Path) -> str:
    """Load the weights in `path` into `model`; returns one line that says whose, what was fitted and what is fresh.

    Positions of another image size are interpolated as OpenCLIP does (bicubic, antialiased). Of a longer text table the
    first rows are taken, so that texts which fit keep their features; a shorter one is interpolated linearly, as
    OpenCLIP does. What the file does not have (Prompter, region temperature) stays as it was initialised.

    Raises:
        InputError: as `read_weights`, or the weights are of another model than `model`; says which it seems to be.
    """
    weights = read_weights(path)
    return _load(model, weights) + ("" if weights.own else _otherwise_shown(path))


def _otherwise_shown(path: str | Path) -> str:
    """A warning if the weights were trained on other pixels than the trainer will give them; else nothing."""
    try:
        mean, std = shown = read_preprocessing(path)
    except InputError as error:
        return f"; WARNING: {error}"
    if shown == CLIP:
        return ""
    return f"; WARNING: they know pixels of mean {mean} and std {std}, and are given CLIP's"


def _load(model: CllipModel, weights: Weights) -> str:
    mine = model.state_dict()
    _check_kind(weights, model)
    state, notes = dict(weights.state), []
    if model.prompter is None and _has_prompter(weights):
        state = {name: x for name, x in state.items() if not name.startswith("prompter.")}
        notes.append("the Prompter left out")
    if model.region_logit_scale is None and state.pop("region_logit_scale", None) is not None:
        notes.append("the region temperature left out")
    tables = (state.get("visual.positions"), state.get("text.positions"))
    if all(table is not None and table.dim() == 2 for table in tables):
        notes += _fit_positions(state, model.config)

    fresh = mine.keys() - state.keys()
    wrong = {name for name in fresh if name.startswith(TOWERS)} | (state.keys() - mine.keys())
    wrong |= {name for name in mine.keys() & state.keys() if mine[name].shape != state[name].shape}
    if wrong:
        shapes = [f"{name} {_shape(state, name)} instead of {_shape(mine, name)}" for name in sorted(wrong)]
        raise InputError(f"{weights.source} does not fit {model.config.name}: {shorten(shapes)}")
    model.load_state_dict(state, strict=False)
    notes += [f"fresh: {_parts(fresh)}"] if fresh else []
    return "; ".join([f"weights of {weights.source}", *notes])


def load_clip(path: str | Path, name: str = "", *, attention: str | None = None) -> CllipModel:
    """OpenCLIP's or Hugging Face's CLIP with the image size and text length it has; regions are read by RoIAlign.

    Args:
        path: as `read_weights`.
        name: the preset, where the weights do not tell: without their configuration the activation is not known.
        attention: back end; default: the preset's.

    Raises:
        InputError: as `load_pretrained`, or several presets fit and none is named.
    """
    weights = read_weights(path)
    names = [name] if name else fitting_presets(weights)
    if len(names) != 1:
        one_of = (
            f"could be {' or '.join(names)}, as there is no configuration beside it: name it with --model or model="
        )
        seems = one_of if names else f"fits no preset: {', '.join(PRESETS)}"
        raise InputError(f"{weights.source} {seems}")
    check_choice("model", names[0], tuple(PRESETS))
    patches = len(weights.state["visual.positions"]) - 1
    model = create_model(
        names[0],
        image_size=round(patches**0.5) * PRESETS[names[0]].patch_size,
        vocab_size=weights.state["text.tokens.weight"].shape[0],
        text_length=len(weights.state["text.positions"]),
        region="roi_align",
        attention=attention,
    )
    _load(model, weights)
    return model


def load_model(path: str | Path) -> CllipModel:
    """The model in a file that this package wrote: a checkpoint of the trainer, or `export`'s safetensors.

    Raises:
        InputError: as `read_weights`, or the file is not of this package.
    """
    weights = read_weights(path)
    if not weights.own:
        raise InputError(f"{weights.source} is not of this package; load it with load_pretrained into a preset's model")
    model = CllipModel(ModelConfig.from_dict(weights.config))
    _load(model, weights)
    return model


def _shape(state: Mapping[str, Tensor], name: str) -> object:
    return list(state[name].shape) if name in state else "nothing"


def _parts(names: Iterable[str]) -> str:
    """The names' parts in words."""
    parts = {
        "prompter.": "Prompter",
        "prompter.box_head.": "grounding head",
        "region_logit_scale": "region temperature",
    }
    return ", ".join(word for start, word in parts.items() if any(name.startswith(start) for name in names))


def _check_kind(weights: Weights, model: CllipModel) -> None:
    """Raise `InputError` unless the weights are of a model like this one, but for image size and text length."""
    facts = _facts(weights)
    differing = _differing(facts, model.config, prompter=_has_prompter(weights) and model.prompter is not None)
    if not differing:
        return
    seems = " or ".join(fitting_presets(weights)) or "no preset's model"
    if facts["vocab_size"] != model.config.vocab_size:
        differing.append("texts need the tokenizer that the weights were trained with")
    raise InputError(
        f"{weights.source} does not fit {model.config.name}: {'; '.join(differing)}. It seems to be {seems}"
    )


def fitting_presets(weights: Weights) -> list[str]:
    """Names of the presets that the weights could be of, as far as shapes and configuration tell."""
    facts = _facts(weights)
    return [
        name
        for name, preset in PRESETS.items()
        if not _differing(facts, replace(preset, vocab_size=facts["vocab_size"]), prompter=False)
    ]


def _has_prompter(weights: Weights) -> bool:
    return any(name.startswith("prompter.") for name in weights.state)


def _differing(facts: Mapping[str, object], config: ModelConfig, prompter: bool) -> list[str]:
    mine = config.to_dict() | _hidden_sizes(config)
    left_out = _FREE if prompter else _FREE | _PROMPTER
    return [
        f"{name} is {value} there, {mine[name]} here"
        for name, value in facts.items()
        if name not in left_out and value != mine[name]
    ]


def _hidden_sizes(config: ModelConfig) -> dict[str, int]:
    widths = {"vision": config.vision_width, "text": config.text_width}
    return {f"{tower}_hidden": int(width * config.mlp_ratio) for tower, width in widths.items()}


def _facts(weights: Weights) -> dict[str, object]:
    """Fields of `ModelConfig` (and hidden sizes) as the file's configuration and shapes show them."""
    if weights.own:
        return ModelConfig.from_dict(weights.config).to_dict()
    state = weights.state
    shapes = {
        "embed_dim": state["visual.project.weight"].shape[0],
        "patch_size": state["visual.stem.weight"].shape[-1],
        "vision_width": state["visual.class_token"].shape[0],
        "vision_depth": sum(name.startswith("visual.blocks.") and name.endswith("norm_1.bias") for name in state),
        "vision_hidden": state["visual.blocks.0.mlp.0.weight"].shape[0],
        "text_width": state["text.tokens.weight"].shape[-1],
        "text_depth": sum(name.startswith("text.blocks.") and name.endswith("norm_1.bias") for name in state),
        "text_hidden": state["text.blocks.0.mlp.0.weight"].shape[0],
        "vocab_size": state["text.tokens.weight"].shape[0],
    }
    return shapes | weights.config


def _fit_positions(state: dict[str, Tensor], config: ModelConfig) -> list[str]:
    """Fit both position tables in `state` to the configuration; says what was done."""
    notes = []
    extra, grid = int(config.class_token), config.patch_grid
    table = state["visual.positions"]
    side = round((len(table) - extra) ** 0.5)
    if (side, side) != grid and side * side == len(table) - extra:
        patches = table[extra:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
        patches = F.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
        state["visual.positions"] = torch.cat([table[:extra], patches[0].permute(1, 2, 0).flatten(0, 1)])
        notes.append(f"positions interpolated from {side}×{side} to {grid[0]}×{grid[1]} patches")
    table, length = state["text.positions"], config.text_length
    if len(table) > length:
        state["text.positions"] = table[:length]
        notes.append(f"the first {length} of {len(table)} text positions")
    elif len(table) < length:
        longer = F.interpolate(table.T[None], length, mode="linear", align_corners=False)
        state["text.positions"] = longer[0].T
        notes.append(f"text positions interpolated from {len(table)} to {length}")
    return notes
