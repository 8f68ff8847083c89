"""Hugging Face's CLIPModel: the key map, and `config.json` in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from cllip_fast.errors import InputError
from cllip_fast.interchange.keymap import KeyMap, Peer
from cllip_fast.models import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
# Position numbers 0, 1, …, which older versions stored.
IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
VISION_BLOCK, TEXT_BLOCK = "vision_model.encoder.layers", "text_model.encoder.layers"

_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_LAYER_NORM_EPS = 1e-5


def names(vision_depth: int, text_depth: int) -> KeyMap:
    """Ours to Hugging Face's, for towers of these depths."""
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    found = {
        "visual.class_token": Peer((f"{vision}.class_embedding",)),
        "visual.positions": Peer((f"{vision}.position_embedding.weight",)),
        "visual.stem.weight": Peer((f"{vision}.patch_embedding.weight",)),
        "visual.project.weight": Peer(("visual_projection.weight",)),
        "text.tokens.weight": Peer((f"{text}.token_embedding.weight",)),
        "text.positions": Peer((f"{text}.position_embedding.weight",)),
        "text.project.weight": Peer(("text_projection.weight",)),
        "logit_scale": Peer(("logit_scale",)),
    }
    for kind in ("weight", "bias"):
        found |= {
            f"visual.norm_in.{kind}": Peer((f"vision_model.pre_layrnorm.{kind}",)),  # their spelling
            f"visual.norm_out.{kind}": Peer((f"vision_model.post_layernorm.{kind}",)),
            f"text.norm_out.{kind}": Peer((f"text_model.final_layer_norm.{kind}",)),
        }
    for ours, theirs, depth in (("visual", VISION_BLOCK, vision_depth), ("text", TEXT_BLOCK, text_depth)):
        for block in range(depth):
            found |= _block(f"{ours}.blocks.{block}", f"{theirs}.{block}")
    return found


def _block(ours: str, theirs: str) -> KeyMap:
    found = {}
    for kind in ("weight", "bias"):
        found |= {
            f"{ours}.norm_1.{kind}": Peer((f"{theirs}.layer_norm1.{kind}",)),
            f"{ours}.attention.qkv.{kind}": Peer(tuple(f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv")),
            f"{ours}.attention.out.{kind}": Peer((f"{theirs}.self_attn.out_proj.{kind}",)),
            f"{ours}.norm_2.{kind}": Peer((f"{theirs}.layer_norm2.{kind}",)),
            f"{ours}.mlp.0.{kind}": Peer((f"{theirs}.mlp.fc1.{kind}",)),
            f"{ours}.mlp.2.{kind}": Peer((f"{theirs}.mlp.fc2.{kind}",)),
        }
    return found


def read_config(values: Mapping[str, object], source: str) -> dict[str, object]:
    """What `config.json` says that the weights' shapes do not: {field of `ModelConfig`: value}.

    Raises:
        InputError: the configuration is of a model that this one cannot be.
    """
    if values.get("model_type") != "clip":
        raise InputError(f"{source} is of a {values.get('model_type')!r} model, expected 'clip'")
    # Old files hold a second dict of those options that differ from the defaults; it goes before the first.
    vision, text = (
        dict(values.get(name) or {}) | dict(values.get(f"{name}_dict") or {})
        for name in ("vision_config", "text_config")
    )
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if len(activations) > 1 or not activations <= _ACTIVATIONS.keys():
        raise InputError(f"{source} has hidden_act {sorted(activations)}, expected one of {', '.join(_ACTIVATIONS)}")
    for tower in (vision, text):
        eps = tower.get("layer_norm_eps", _LAYER_NORM_EPS)
        if eps != _LAYER_NORM_EPS:
            raise InputError(f"{source} has layer_norm_eps {eps}, expected {_LAYER_NORM_EPS}")
    return {
        "vision_heads": vision.get("num_attention_heads", 12),
        "text_heads": text.get("num_attention_heads", 8),
        "quick_gelu": _ACTIVATIONS[activations.pop()],
    }


def write_config(config: ModelConfig, end_id: int) -> dict[str, object]:
    """The contents of `config.json` for a model of CLIP's architecture."""
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": {
            "hidden_size": config.vision_width,
            "intermediate_size": int(config.vision_width * config.mlp_ratio),
            "num_hidden_layers": config.vision_depth,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
            "layer_norm_eps": _LAYER_NORM_EPS,
        },
        "text_config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.text_width,
            "intermediate_size": int(config.text_width * config.mlp_ratio),
            "num_hidden_layers": config.text_depth,
            "num_attention_heads": config.text_heads,
            "max_position_embeddings": config.text_length,
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
            "layer_norm_eps": _LAYER_NORM_EPS,
            "eos_token_id": end_id,
            "pad_token_id": 0,
        },
    }
