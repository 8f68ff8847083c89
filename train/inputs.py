"""The run's data: shards (generated on first use), tokenizer, a training loader and one loader an evaluation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from cllip_fast import extras
from cllip_fast.data import (
    DatasetInfo,
    Loader,
    Tokenizer,
    create_dali_loader,
    create_loader,
    load_tokenizer,
    make_scenes,
    read_dataset_info,
)
from cllip_fast.errors import InputError, check_choice
from cllip_fast.evaluate.listing import look_through
from cllip_fast.models import PRESETS
from cllip_fast.train.config import Config
from cllip_fast.train.distributed import World


@dataclass
class Inputs:
    train: Loader
    splits: dict[str, Loader]  # name -> evaluation loader
    info: DatasetInfo
    tokenizer: Tokenizer
    steps_per_epoch: int

    def describe(self) -> str:
        sizes = "".join(f", {name} {loader.samples}" for name, loader in self.splits.items())
        name, count = self.info.name, len(self.info.classes)
        train = f"train {self.train.samples} ({self.steps_per_epoch} steps an epoch)"
        return f"{name}: {train}{sizes} samples, {count} classes, decoder {self.train.decoder}"


def find_training_data(config: Config, world: World) -> str:
    """The shards to train on; scenes are generated, once, when they are asked for."""
    if config.train_data != "scenes":
        return config.train_data
    return str(world.from_main(lambda: make_scenes(config.scenes_dir, train=config.scenes)) / "train")


def name_splits(config: Config) -> dict[str, str]:
    """By name, the shards to evaluate on; generated scenes bring their own."""
    if config.val_data or config.train_data != "scenes":
        return parse_splits(config.val_data)
    root = Path(config.scenes_dir)
    return {"val": str(root / "val"), "unseen": str(root / "unseen")}


def parse_splits(text: str) -> dict[str, str]:
    """`name=shards,name=shards` as a dict."""
    splits = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, spec = entry.partition("=")
        if not (name and equals and spec):
            raise InputError(f"--val-data has the entry {entry!r}, expected name=shards")
        splits[name] = spec
    return splits


def parse_weights(text: str) -> list[float] | None:
    """`a,b,...` as numbers; None where no weights are asked for."""
    try:
        return [float(weight) for weight in text.split(",")] if text else None
    except ValueError as error:
        raise InputError(f"--weights is {text!r}, expected numbers joined by ','") from error


def check_same_data(train: Loader, splits: dict[str, Loader], world: World) -> None:
    """Refuse ranks with other samples or texts: what they take would not be slices of the same batches."""
    if world.group is None:
        return
    state = train.state_dict()
    mine = {"--tokenizer": state["tokenizer"], "--seed": state["seed"]}
    mine["--train-data"] = f"{state['size']} samples ({state['data']})"
    for name, loader in splits.items():
        mine[f"--val-data {name}"] = f"{loader.samples} samples ({loader.parts.assembler.index.digest()})"
    found = [mine] * world.size
    dist.all_gather_object(found, mine, group=world.group)
    for option in mine:
        values = [of_rank.get(option) for of_rank in found]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise InputError(
                f"{option} differs between ranks: {values[0]} on rank 0, {values[other]} on rank {other}; "
                "all ranks must read the same"
            )


def check_tokenizer(tokenizer: Tokenizer, path: str, model: str) -> None:
    """Refuse a tokenizer whose texts may hold id 0 with a text tower that masks id 0: it would not see all of them."""
    if tokenizer.pad_in_text and not PRESETS[model].causal_text:
        raise InputError(
            f"--tokenizer {path} ({tokenizer.kind}) uses id {tokenizer.pad_id} in texts, which the text tower of "
            f"--model {model} masks as padding; take another tokenizer, or a model with a causal text tower"
        )


def create_inputs(config: Config, world: World) -> Inputs:
    check_choice("--model", config.model, tuple(PRESETS))
    if config.loader == "dali":
        extras.require("dali", "--loader dali")
    train_spec = find_training_data(config, world)
    info = read_dataset_info(train_spec)
    path = config.tokenizer or info.tokenizer_path
    if not path:
        raise InputError(f"no tokenizer.json beside --train-data {train_spec}: name one with --tokenizer")
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, path, config.model)
    common = {
        "tokenizer": tokenizer,
        "batch_size": config.batch_size,
        "image_size": config.image_size or PRESETS[config.model].image_size,
        "text_length": config.text_length,
        "region_length": config.region_length,
        "seed": config.seed,
        "decoder": config.decoder,
        "pin_memory": world.device.type == "cuda",
        "rank": world.rank,
        "world_size": world.size,
    }
    create: Callable[..., Loader] = create_loader
    if config.loader == "dali":
        create = partial(create_dali_loader, device=world.device, threads=config.loader_threads)
    train = create(
        train_spec, train=True, weights=parse_weights(config.weights), resampled=config.resampled,
        accum_freq=config.accum_freq, max_regions=config.max_regions, crop=config.crop, flip=config.flip,
        workers=config.workers, max_broken=config.max_broken, **common,
    )  # fmt: skip
    # Evaluation keeps the plain loader: figures must not depend on who decoded for training.
    crop = "pad" if config.crop == "random" else config.crop
    splits = {
        name: create_loader(
            spec, train=False, max_regions=look_through(spec, progress=world.is_main).most, crop=crop, **common
        )
        for name, spec in name_splits(config).items()
    }
    check_same_data(train, splits, world)
    return Inputs(train, splits, info, tokenizer, len(train) // config.accum_freq)
