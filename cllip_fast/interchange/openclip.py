"""OpenCLIP's ViT models: the key map, and `open_clip_config.json` in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from cllip_fast.errors import InputError
from cllip_fast.interchange.keymap import KeyMap, Peer
from cllip_fast.models import ModelConfig

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Sizes that OpenAI's own files carry beside the weights.
IGNORED = ("input_resolution", "context_length", "vocab_size")
VISION_BLOCK, TEXT_BLOCK = "visual.transformer.resblocks", "transformer.resblocks"

_HEAD_WIDTH = 64  # OpenCLIP's default
# Options that say nothing about the arithmetic of a forward pass, or that the shapes show.
_VISION_FREE = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout")
_TEXT_FREE = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id")
# The only values of the others that are this model's; an option that is absent or None has OpenCLIP's default.
_VISION_FIXED = {"pool_type": ("tok",), "pos_embed_type": ("learnable",), "timm_model_name": ()}
_TEXT_FIXED = {"pool_type": ("argmax", "eos"), "proj_type": ("linear",)}


def names(vision_depth: int, text_depth: int) -> KeyMap:
    """Ours to OpenCLIP's, for towers of these depths."""
    found = {
        "visual.class_token": Peer(("visual.class_embedding",)),
        "visual.positions": Peer(("visual.positional_embedding",)),
        "visual.stem.weight": Peer(("visual.conv1.weight",)),
        "visual.project.weight": Peer(("visual.proj",), transposed=True),
        "text.tokens.weight": Peer(("token_embedding.weight",)),
        "text.positions": Peer(("positional_embedding",)),
        "text.project.weight": Peer(("text_projection",), transposed=True),
        "logit_scale": Peer(("logit_scale",)),
    }
    for kind in ("weight", "bias"):
        found |= {
            f"visual.norm_in.{kind}": Peer((f"visual.ln_pre.{kind}",)),
            f"visual.norm_out.{kind}": Peer((f"visual.ln_post.{kind}",)),
            f"text.norm_out.{kind}": Peer((f"ln_final.{kind}",)),
        }
    for ours, theirs, depth in (("visual", VISION_BLOCK, vision_depth), ("text", TEXT_BLOCK, text_depth)):
        for block in range(depth):
            found |= _block(f"{ours}.blocks.{block}", f"{theirs}.{block}")
    return found


def _block(ours: str, theirs: str) -> KeyMap:
    found = {}
    for kind in ("weight", "bias"):
        found |= {
            f"{ours}.norm_1.{kind}": Peer((f"{theirs}.ln_1.{kind}",)),
            f"{ours}.attention.qkv.{kind}": Peer((f"{theirs}.attn.in_proj_{kind}",)),
            f"{ours}.attention.out.{kind}": Peer((f"{theirs}.attn.out_proj.{kind}",)),
            f"{ours}.norm_2.{kind}": Peer((f"{theirs}.ln_2.{kind}",)),
            f"{ours}.mlp.0.{kind}": Peer((f"{theirs}.mlp.c_fc.{kind}",)),
            f"{ours}.mlp.2.{kind}": Peer((f"{theirs}.mlp.c_proj.{kind}",)),
        }
    return found


def read_config(values: Mapping[str, object], source: str) -> dict[str, object]:
    """What `open_clip_config.json` says that the weights' shapes do not: {field of `ModelConfig`: value}.

    Raises:
        InputError: the configuration is of a model that this one cannot be.
    """
    try:
        model = values["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        heads = {
            "vision_heads": vision["width"] // vision.get("head_width", _HEAD_WIDTH),
            "text_heads": text.get("heads", 8),
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{source} is no configuration of an OpenCLIP ViT: {error!r} is missing or wrong") from error
    for tower, options, free, fixed in (
        ("vision_cfg", vision, _VISION_FREE, _VISION_FIXED),
        ("text_cfg", text, _TEXT_FREE, _TEXT_FIXED),
    ):
        for option, value in options.items():
            if option not in free and value not in (None, False, *fixed.get(option, ())):
                raise InputError(f"{source} sets {tower}.{option} to {value!r}, which CllipModel does not have")
    return heads | {"quick_gelu": bool(model.get("quick_gelu", False))}


def write_config(
    config: ModelConfig, end_id: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, object]:
    """The contents of `open_clip_config.json` for a model of CLIP's architecture."""
    # The highest id is the end of text for CLIP's own tokenizer; OpenCLIP's default, argmax, relies on it.
    pooling = {} if end_id == config.vocab_size - 1 else {"pool_type": "eos", "eos_id": end_id}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": config.vision_depth,
            "width": config.vision_width,
            "head_width": config.vision_width // config.vision_heads,
            "mlp_ratio": config.mlp_ratio,
            "patch_size": config.patch_size,
        },
        "text_cfg": {
            "context_length": config.text_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_depth,
            "mlp_ratio": config.mlp_ratio,
        }
        | pooling,
    }
    return {"model_cfg": model, "preprocess_cfg": {"mean": list(mean), "std": list(std)}}
