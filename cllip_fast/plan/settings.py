"""The description of a run that is to be planned; its fields are the trainer's options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from cllip_fast.errors import InputError, check_choice
from cllip_fast.losses.cllip import PARTS
from cllip_fast.models import PRESETS, CllipModel, ModelConfig, create_model
from cllip_fast.models.attention import BACKENDS
from cllip_fast.models.checkpointing import MODES

# The trainer's --opt, and what they are called here.
OPTIMIZERS = {"adamw": "AdamW", "apex-adam": "Apex Adam", "apex-lamb": "Apex LAMB", "muon": "Muon, AdamW"}
LAYER = ("prompter.qkv.", "prompter.out.", "prompter.mlp.")


@dataclass(frozen=True)
class Settings:
    """A run: model, batch, losses, GPUs.

    Args:
        model: preset.
        batch_size: images of a micro-batch on a GPU.
        gpus: how many GPUs.
        accum_freq: micro-batches in a step of the optimizer, contrasted with one another (GradCache).
        precision: "fp32", or "amp_bf16" or "amp_fp16" (autocast).
        image_size: pixels a side; 0: the preset's.
        text_length, region_length: tokens of a caption and of a region text, padding included.
        max_regions: regions of an image.
        losses: of "clip", "region", "grounding", "patch", "localization".
        region: "prompter" or "roi_align".
        prompter_pool: "all" or "prompt"; "": the preset's.
        attention: back end; "": the preset's.
        grad_checkpointing: "none"; "selective": of each block of both towers and of the Prompter's layer the input and
            the outputs of its products are kept; "blocks": the input alone.
        opt: optimizer, one of `OPTIMIZERS`.

    Raises:
        InputError: an unknown name, a number below 1, or sizes that do not fit the model.
    """

    model: str
    batch_size: int
    gpus: int = 1
    accum_freq: int = 1
    precision: str = "amp_bf16"
    image_size: int = 0
    text_length: int = 32
    region_length: int = 8
    max_regions: int = 4
    losses: tuple[str, ...] = tuple(PARTS)
    region: str = "prompter"
    prompter_pool: str = ""
    attention: str = ""
    grad_checkpointing: str = "none"
    opt: str = "adamw"

    def __post_init__(self) -> None:
        check_choice("--model", self.model, tuple(PRESETS))
        check_choice("--precision", self.precision, ("fp32", "amp_bf16", "amp_fp16"))
        check_choice("--attention", self.attention, ("", *BACKENDS))
        check_choice("--prompter-pool", self.prompter_pool, ("", "all", "prompt"))
        check_choice("--grad-checkpointing", self.grad_checkpointing, MODES)
        check_choice("--opt", self.opt, tuple(OPTIMIZERS))
        if not self.losses:
            raise InputError(f"--losses is empty, expected some of {', '.join(PARTS)}")
        for loss in self.losses:
            check_choice("--losses", loss, tuple(PARTS))
        for name in ("batch_size", "gpus", "accum_freq", "text_length", "region_length", "max_regions"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.image_size < 0:
            raise InputError(f"--image-size is {self.image_size}, expected 0 or more")
        if self.region_length > self.text_length:
            raise InputError(f"--region-length is {self.region_length}, expected at most --text-length "
                             f"{self.text_length}")  # fmt: skip
        if "grounding" in self.losses and self.region == "roi_align":
            raise InputError("--losses has 'grounding', which needs --region prompter, got 'roi_align'")
        _ = self.config

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        values = PRESETS[self.model].to_dict() | {"text_length": self.text_length, "region": self.region}
        given = {"image_size": self.image_size, "attention": self.attention, "prompter_pool": self.prompter_pool}
        return ModelConfig.from_dict(values | {name: value for name, value in given.items() if value})

    @property
    def element(self) -> int:
        """Bytes of a number in the products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def parts(self) -> tuple[str, ...]:
        """`CllipModel.forward`'s parts that these losses need."""
        return tuple(dict.fromkeys({"localization": "patch"}.get(loss, loss) for loss in self.losses if loss != "clip"))

    @property
    def regions(self) -> int:
        """Regions on a GPU at a time; 0 if no loss asks for them."""
        return self.batch_size * self.max_regions if self.parts else 0

    def with_batch(self, batch_size: int) -> Settings:
        """The same run with another batch size."""
        return replace(self, batch_size=batch_size)

    def parameters(self) -> Parameters:
        """What the model's parameters come to; counted on the model itself, built without memory."""
        return count_parameters(self.config, self.parts)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all, those that are trained (tensors and numbers), and trained ones by part."""

    total: int
    trained: int
    tensors: int
    cast: int  # used; matrices and kernels, of which autocast makes a 16-bit copy
    cast_apart: int  # those among them that are in no block and no layer of the Prompter
    hidden: int  # used; matrices of blocks and of the Prompter's layer: Muon's
    hidden_tensors: int
    by_part: dict[str, int]  # trained


@lru_cache(maxsize=16)
def count_parameters(config: ModelConfig, parts: tuple[str, ...]) -> Parameters:
    """Count the parameters of a model of which `parts` are trained."""
    values = config.to_dict() | {"attention": "sdpa"}  # back ends have no parameters; theirs may be absent here
    with torch.device("meta"):
        model: CllipModel = create_model(values.pop("name"), **values)
    model.freeze_unused(parts)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    by_part = dict.fromkeys(("visual", "text", "prompter"), 0)
    for name, each in trained.items():
        part = name.split(".")[0]
        if part in by_part:
            by_part[part] += each.numel()
    cast = {name: each for name, each in trained.items() if each.dim() > 1 and name.endswith("weight")}
    del cast["text.tokens.weight"]
    hidden = [each.numel() for name, each in cast.items() if ".blocks." in name or name.startswith(LAYER)]
    return Parameters(
        total=sum(each.numel() for each in model.parameters()),
        trained=sum(each.numel() for each in trained.values()),
        tensors=len(trained),
        cast=sum(each.numel() for each in cast.values()),
        cast_apart=sum(each.numel() for each in cast.values()) - sum(hidden),
        hidden=sum(hidden),
        hidden_tensors=len(hidden),
        by_part=by_part,
    )
