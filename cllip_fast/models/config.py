"""The model's description: one flat, frozen, JSON-able dataclass, and the presets by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from cllip_fast.errors import InputError, check_choice
from cllip_fast.models.attention import BACKENDS
from cllip_fast.models.norm import NORMS

CONV_STEM_STRIDE = 8  # three convolutions of stride 2


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a `CllipModel`; stored in checkpoints through `to_dict`.

    Lengths are in tokens, image sizes in pixels. Images are square.

    Raises:
        InputError: sizes that do not fit together, or an unknown choice.
    """

    name: str
    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    text_width: int
    text_depth: int
    text_heads: int
    vocab_size: int = 49408
    text_length: int = 77
    stem: str = "patch"  # "patch": one convolution of the patch's size; "conv": three 4×4 convolutions of stride 2
    class_token: bool = True  # pooled feature: the class token; without one: the mean over the patches
    causal_text: bool = True  # pooled at the last token; otherwise bidirectional with the mean over the real tokens
    mlp_ratio: float = 4.0
    quick_gelu: bool = False  # in both towers, as OpenAI trained; the Prompter always has GELU
    region: str = "prompter"
    prompter_pool: str = "all"  # mean over prompt and image tokens (paper); "prompt": over the prompt's own tokens
    prompter_positions: bool = False  # True: encodings of the patch centres are added to the Prompter's image tokens
    attention: str = "sdpa"
    norm: str = "torch"
    share_logit_scale: bool = False  # one temperature for global and local losses

    def __post_init__(self) -> None:
        check_choice("stem", self.stem, ("patch", "conv"))
        check_choice("region", self.region, ("prompter", "roi_align"))
        check_choice("prompter_pool", self.prompter_pool, ("all", "prompt"))
        check_choice("attention", self.attention, tuple(BACKENDS))
        check_choice("norm", self.norm, NORMS)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{field.name} is {value!r}, expected a positive integer")
            if field.type == "bool" and not isinstance(value, bool):
                raise InputError(f"{field.name} is {value!r}, expected true or false")
        if not isinstance(self.mlp_ratio, (int, float)) or self.mlp_ratio <= 0:
            raise InputError(f"mlp_ratio is {self.mlp_ratio!r}, expected a positive number")
        if self.image_size % self.patch_size:
            raise InputError(f"image_size is {self.image_size}, expected a multiple of patch_size {self.patch_size}")
        if self.stem == "conv" and self.patch_size != CONV_STEM_STRIDE:
            raise InputError(f"patch_size is {self.patch_size}, expected {CONV_STEM_STRIDE} with stem='conv'")
        if self.vision_width % 4:
            raise InputError(f"vision_width is {self.vision_width}, expected a multiple of 4 (corner encodings)")
        for tower, width, heads in (
            ("vision", self.vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise InputError(f"{tower}_width is {width}, expected a multiple of {tower}_heads {heads}")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    def to_dict(self) -> dict[str, object]:
        """A plain dict of numbers, strings and booleans."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ModelConfig:
        """The inverse of `to_dict`. Raises `InputError` for names that are unknown or missing."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown model options {', '.join(unknown)}, expected among {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"model options are incomplete: {error}") from error


def _clip(
    name: str, embed_dim: int, vision: tuple[int, int, int, int], text: tuple[int, int, int], image_size: int = 224
) -> ModelConfig:
    patch_size, width, depth, heads = vision
    text_width, text_depth, text_heads = text
    return ModelConfig(
        name=name,
        embed_dim=embed_dim,
        image_size=image_size,
        patch_size=patch_size,
        vision_width=width,
        vision_depth=depth,
        vision_heads=heads,
        text_width=text_width,
        text_depth=text_depth,
        text_heads=text_heads,
    )


_TINY = ModelConfig(
    name="tiny",
    embed_dim=128,
    image_size=64,
    patch_size=8,
    vision_width=128,
    vision_depth=3,
    vision_heads=4,
    text_width=128,
    text_depth=2,
    text_heads=4,
    vocab_size=512,
    text_length=32,
    stem="conv",
    class_token=False,
    causal_text=False,
    prompter_pool="prompt",
    prompter_positions=True,
    attention="matmul",
)

# Widths, depths and heads as in OpenCLIP's configurations of the same names (Ti follows S: the text tower is as wide
# as the vision tower). Image sizes are defaults: the paper trains L/14 and H/14 at 336.
_PUBLISHED = (
    _clip("ViT-B-32", 512, (32, 768, 12, 12), (512, 12, 8)),
    _clip("ViT-B-16", 512, (16, 768, 12, 12), (512, 12, 8)),
    _clip("ViT-L-14", 768, (14, 1024, 24, 16), (768, 12, 12)),
    _clip("ViT-H-14", 1024, (14, 1280, 32, 16), (1024, 24, 16)),
)

PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        _TINY,
        _clip("ViT-Ti-16", 192, (16, 192, 12, 3), (192, 12, 3)),
        _clip("ViT-S-16", 384, (16, 384, 12, 6), (384, 12, 6)),
        *_PUBLISHED,
        *(replace(preset, name=f"{preset.name}-quickgelu", quick_gelu=True) for preset in _PUBLISHED),
    )
}
