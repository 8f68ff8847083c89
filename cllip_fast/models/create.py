"""From a preset's name to a model."""

from __future__ import annotations

from cllip_fast.errors import InputError
from cllip_fast.models.cllip import CllipModel
from cllip_fast.models.config import PRESETS, ModelConfig


def create_model(
    name: str,
    *,
    image_size: int | None = None,
    vocab_size: int | None = None,
    text_length: int | None = None,
    region: str = "prompter",
    attention: str | None = None,
    **overrides: object,
) -> CllipModel:
    """Build a preset, freshly initialised.

    Args:
        name: one of `PRESETS`.
        image_size: side of the images in pixels; default: the preset's.
        vocab_size, text_length: from the tokenizer; default: the preset's.
        region: "prompter", or "roi_align" for its ablation (no extra parameters, no grounding).
        attention: one of `attention.BACKENDS`; default: the preset's ("sdpa"; tiny: "matmul").
        overrides: any other field of `ModelConfig`.

    Raises:
        InputError: unknown preset or option, sizes that do not fit, or an attention back end that is absent.
    """
    if name not in PRESETS:
        raise InputError(f"model is {name!r}, expected one of {', '.join(PRESETS)}")
    given = {"image_size": image_size, "vocab_size": vocab_size, "text_length": text_length, "attention": attention}
    values = PRESETS[name].to_dict() | {key: value for key, value in given.items() if value is not None}
    return CllipModel(ModelConfig.from_dict(values | {"region": region} | overrides))
