"""The trainer's options: one flat dataclass, from which flags, TOML files and checkpoints are read and written."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

from cllip_fast.arguments import Parser, did_you_mean
from cllip_fast.errors import InputError, check_choice
from cllip_fast.models.attention import BACKENDS
from cllip_fast.models.checkpointing import MODES
from cllip_fast.models.norm import NORMS
from cllip_fast.plan.settings import OPTIMIZERS
from cllip_fast.train.precision import PRECISIONS, check_precision

LOSSES = ("clip", "region", "grounding", "patch", "localization")
REPORTS = ("tensorboard", "wandb")


def option(default: object, group: str, help: str, choices: tuple[str, ...] | None = None) -> typing.Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class Config:
    """Everything a run depends on. The defaults are the run that `make train` shows: minutes on two CPU cores."""

    train_data: str = option("scenes", "data", "folder, tar, x/{0000..0012}.tar, or several joined by '::'; "
                             "'scenes' generates scenes on first use")  # fmt: skip
    weights: str = option(
        "", "data", "a,b,...: shares of the parts of --train-data in an epoch; default: each sample once"
    )
    resampled: bool = option(False, "data", "draw every sample anew, with replacement")
    val_data: str = option("", "data", "name=shards[,name=shards ...] to evaluate on; generated scenes bring their own")
    scenes_dir: str = option("data/scenes", "data", "where generated scenes are kept")
    scenes: int = option(30_000, "data", "how many training scenes to generate")
    tokenizer: str = option("", "data", "tokenizer file; default: the one beside the training data")
    text_length: int = option(32, "data", "tokens of a caption")
    region_length: int = option(8, "data", "tokens of a region text")
    max_regions: int = option(4, "data", "regions sampled from an image (the paper's M)")
    crop: str = option("pad", "data", "how an image becomes square", ("pad", "center", "random"))
    flip: float = option(0.0, "data", "share of images to mirror; none whose texts tell left from right")
    loader: str = option("plain", "data", "what decodes training images: PyTorch's workers, or DALI, on the GPU of a "
                         "run that has one", ("plain", "dali"))  # fmt: skip
    loader_threads: int = option(4, "data", "DALI's threads per rank")
    workers: int = option(0, "data", "loader processes per rank")
    decoder: str = option("auto", "data", "JPEG library; auto: simplejpeg where it is installed",
                          ("auto", "pillow", "simplejpeg"))  # fmt: skip
    max_broken: float = option(0.05, "data", "share of a rank's last 1000 samples; more broken ones end the run")

    model: str = option("tiny", "model", "preset")
    pretrained: str = option("", "model", "weights to start from: file or folder of OpenCLIP, Hugging Face or ours")
    image_size: int = option(0, "model", "pixels a side; 0: the preset's")
    region: str = option("prompter", "model", "how a region is read from the image", ("prompter", "roi_align"))
    prompter_pool: str = option(
        "",
        "model",
        "tokens whose mean is a region: all (the paper's) or the prompt's own; default: the preset's",
        ("", "all", "prompt"),
    )
    attention: str = option("", "model", "attention back end; default: the preset's", ("", *BACKENDS))
    norm: str = option("torch", "model", "layer norm back end", NORMS)
    text_packing: bool = option(False, "model", "text towers on the texts' own tokens, without padding")
    precision: str = option("auto", "model", "auto: bf16 autocast on a GPU, fp32 on a CPU", PRECISIONS)
    grad_checkpointing: str = option(
        "none", "model", "of each block keep all, the products' outputs (selective), or its input (blocks)", MODES
    )
    compile: bool = option(False, "model", "torch.compile for each transformer block")

    losses: str = option("all", "losses", f"'all', or some of {','.join(LOSSES)}")
    grounding: str = option("l1_giou", "losses", "box loss; the paper's is mse", ("mse", "l1_giou"))
    patch_pool: str = option("max", "losses", "how a text's similarity to the patches is pooled", ("max", "softmax"))
    filter_threshold: float = option(
        0.0, "losses", "cosine above which region texts are no negatives (paper: 0.9); 0: only equal texts are none"
    )
    local_weight: float = option(1.0, "losses", "weight of the region and grounding losses")
    patch_weight: float = option(1.0, "losses", "weight of the patch-text loss")
    localization_weight: float = option(1.0, "losses", "weight of the patch localization loss")

    steps: int = option(1200, "optimization", "optimizer steps")
    batch_size: int = option(64, "optimization", "images per rank and micro-batch")
    accum_freq: int = option(
        1, "optimization", "micro-batches per step: the gradient of one large batch in the memory of a small one"
    )
    opt: str = option("adamw", "optimization", "muon: for the blocks' matrices, AdamW for the rest", tuple(OPTIMIZERS))
    lr: float = option(2e-3, "optimization", "peak learning rate")
    warmup: int = option(50, "optimization", "steps of linear warm-up; cosine to zero follows")
    wd: float = option(0.1, "optimization", "weight decay, not on biases, norms, tables and logit scales")
    beta1: float = option(0.9, "optimization", "AdamW")
    beta2: float = option(0.98, "optimization", "AdamW")
    eps: float = option(1e-6, "optimization", "AdamW")
    layer_decay: float = option(1.0, "optimization", "factor on a tower's learning rate for each layer further down")
    freeze_steps: int = option(
        0, "optimization", "first steps in which the pretrained towers are frozen; they then warm up like the rest did"
    )
    grad_clip_norm: float = option(1.0, "optimization", "largest gradient norm; 0: no clipping")
    seed: int = option(0, "optimization", "initial weights, order and samples of the data")

    logs_dir: str = option("runs", "run", "folder of all runs")  # torchrun takes --logs for one of its own
    name: str = option("scenes", "run", "folder of this run in it")
    resume: str = option("", "run", "a checkpoint, 'latest' of this run, or 'auto': that one if there is one")
    save_frequency: int = option(200, "run", "steps between checkpoints")
    keep: int = option(3, "run", "newest checkpoints that are kept; 0: all")
    eval_frequency: int = option(0, "run", "steps between evaluations; 0: only at the end")
    log_every_n_steps: int = option(20, "run", "steps between log lines")
    report_to: str = option("", "run", f"beside the JSONL log: some of {','.join(REPORTS)}")
    profile: str = option("", "run", "START:COUNT: a trace of so many steps, from that one on, for Perfetto")
    max_skipped: int = option(
        20, "run", "steps in a row with a loss or gradient that is not finite that end the run; fewer are skipped"
    )
    parallel: str = option("ddp", "run", "ddp: each rank has all weights; fsdp: they are sharded over all; hsdp: over "
                           "--shard-size ranks, and copied to the others", ("ddp", "fsdp", "hsdp"))  # fmt: skip
    shard_size: int = option(0, "run", "ranks that hsdp shards over; 0: those of a machine")
    timeout: int = option(1800, "run", "seconds that ranks wait for one another; "
                          "then the run ends and names those that are missing")  # fmt: skip
    device: str = option("auto", "run", "auto: cuda where there is one, else cpu", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata["choices"]:
                check_choice(flag(field.name), getattr(self, field.name), field.metadata["choices"])
        # fmt: off
        positive = ("scenes", "text_length", "region_length", "max_regions", "steps", "batch_size", "accum_freq",
                    "loader_threads", "save_frequency", "log_every_n_steps", "max_skipped", "timeout")
        others = ("workers", "warmup", "keep", "lr", "wd", "grad_clip_norm", "eval_frequency", "image_size",
                  "filter_threshold", "freeze_steps", "shard_size")
        # fmt: on
        for name, least in (dict.fromkeys(positive, 1) | dict.fromkeys(others, 0)).items():
            if not getattr(self, name) >= least:  # NaN is not either
                raise InputError(f"{flag(name)} is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"--layer-decay is {self.layer_decay}, expected more than 0, up to 1")
        if self.freeze_steps and not self.pretrained:
            raise InputError(f"--freeze-steps is {self.freeze_steps}, expected 0 without --pretrained")
        if self.parallel != "ddp" and self.opt != "adamw":
            raise InputError(f"--opt is {self.opt}, which has not been proved on sharded weights; expected adamw with "
                             f"--parallel {self.parallel}")  # fmt: skip
        check_precision(self.precision)
        _ = self.parts, self.reports, self.profiled  # are checked now, not after the data has been made

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the losses to train with, in their fixed order."""
        if self.losses == "all":
            return LOSSES
        asked = tuple(part.strip() for part in self.losses.split(","))
        for part in asked:
            check_choice("--losses", part, LOSSES)
        return tuple(part for part in LOSSES if part in asked)

    @property
    def reports(self) -> tuple[str, ...]:
        """Where figures go beside the JSONL log."""
        asked = tuple(dict.fromkeys(filter(None, (name.strip() for name in self.report_to.split(",")))))
        for name in asked:
            check_choice("--report-to", name, REPORTS)
        return asked

    @property
    def profiled(self) -> range:
        """The steps to trace, counted from 1; none by default."""
        if not self.profile:
            return range(0)
        start, colon, count = self.profile.partition(":")
        if not (colon and start.isdecimal() and count.isdecimal() and int(start) and int(count)):
            raise InputError(f"--profile is {self.profile!r}, expected START:COUNT, such as 20:3")
        steps = range(int(start), int(start) + int(count))
        if steps[-1] > self.steps:
            raise InputError(f"--profile is {self.profile}, but the run ends after step {self.steps}")
        return steps

    def to_dict(self) -> dict[str, str | int | float]:
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """All options by group, one group a line; those that differ from the default are marked with `*`."""
        lines: dict[str, list[str]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            mark = "*" if value != field.default else ""
            shown = f"'{value}'" if value == "" else value
            lines.setdefault(field.metadata["group"], []).append(f"{field.name}{mark}={shown}")
        return "\n".join(f"  {group:<13} {' '.join(values)}" for group, values in lines.items())


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_toml(path: str) -> dict[str, object]:
    """The options in a TOML file: the names are the flags', with `_` or `-`; tables only group them."""
    try:
        tables = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path} is not TOML: {error}") from error
    flat: dict[str, object] = {}
    for key, value in tables.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Config)}
    options = {}
    for key, value in flat.items():
        name = key.replace("-", "_")
        if name not in kinds:
            near = did_you_mean(name, kinds)
            raise InputError(f"--config {path} sets {key!r}, which is no option of the trainer{near}")
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not kinds[name]:  # isinstance would take True for an int
            raise InputError(f"--config {path} sets {key} to {value!r}, expected {kinds[name].__name__}")
        options[name] = value
    return options


def parse(arguments: list[str] | None = None, description: str | None = None) -> Config:
    """Read the command line: defaults, beneath `--config` file, beneath flags."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; flags go before it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Config):
        name, choices, kind = field.metadata["group"], field.metadata["choices"], type(field.default)
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        how = {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        help = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        groups[name].add_argument(flag(field.name), default=argparse.SUPPRESS, help=help, **how)
    given = vars(parser.parse_args(arguments))
    file = given.pop("config", None)
    return Config(**(read_toml(file) if file else {}) | given)
