"""`cllip-fast eval`: one task on any checkpoint, as a table and as JSON; under torchrun on several ranks."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cllip_fast.data import Loader, create_loader, expand_shards, read_dataset_info
from cllip_fast.data.folders import DatasetInfo
from cllip_fast.errors import InputError
from cllip_fast.evaluate.classification import classification, from_folders, from_shards
from cllip_fast.evaluate.compositional import compositional, read_pairs
from cllip_fast.evaluate.evaluation import evaluate
from cllip_fast.evaluate.listing import look_through
from cllip_fast.evaluate.ranks import summed
from cllip_fast.evaluate.segmentation import list_pairs, segmentation
from cllip_fast.evaluate.table import table
from cllip_fast.evaluate.templates import class_features, read_templates

if TYPE_CHECKING:
    from cllip_fast.inference import TrainedModel
    from cllip_fast.train.distributed import World

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Task:
    """A task: the function that runs it, and the options that it needs and may take beside --checkpoint."""

    run: Callable[[TrainedModel, argparse.Namespace, World], Metrics]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `eval` to the command line."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a checkpoint",
        description=_eval.__doc__,
        epilog="On several GPUs: torchrun --standalone --nproc-per-node 8 -m cllip_fast.cli eval ...",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint, or CLIP weights of others")
    parser.add_argument(
        "--task",
        choices=tuple(TASKS),
        default="shards",
        help="shards: retrieval, region recognition, region-text retrieval, grounding, referring, pointing "
        "(default %(default)s)",
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="shards; class folders; SugarCrepe's JSON files")
    parser.add_argument("--images", type=Path, metavar="DIR", help="segmentation, compositional: folder of the images")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="segmentation: PNGs of class numbers")
    parser.add_argument(
        "--names", type=Path, metavar="TXT", help="class names, one a line (default: the data set's, or its folders')"
    )
    parser.add_argument(
        "--templates",
        help="classification, segmentation: sentences around a name: plain, photo, openai or a file (default: photo)",
    )
    parser.add_argument("--ignore", type=int, help="segmentation: number of pixels that do not count (default 255)")
    parser.add_argument("--tokenizer", metavar="NAME", help="file, or clip (default: the run's own)")
    parser.add_argument("--model", default="", help="preset of CLIP weights that do not tell it")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images at a time (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="shards: loader processes a rank")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="JSON",
        help="where to write (default: eval_<task>.json in the run's folder or here)",
    )
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    """Evaluate a checkpoint (OpenCLIP's and Hugging Face's included) on shards or on a public task's files."""
    from cllip_fast.inference import load
    from cllip_fast.train.distributed import start

    task = TASKS[options.task]
    _check_options(options, task)
    folder = options.checkpoint if options.checkpoint.is_dir() else Path()
    out = options.out or folder / f"eval_{options.task}.json"
    if out.is_dir():
        raise InputError(f"--out {out} is a folder, expected a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour of evaluation
    with start(options.device) as world:
        model = load(
            options.checkpoint,
            device=world.device,
            tokenizer=options.tokenizer,
            model=options.model,
            batch_size=options.batch_size,
            exif=False,
        )
        metrics = task.run(model, options, world)
        if not metrics["images"]:
            raise InputError(f"--task {options.task}: none of the images can be used, nothing is evaluated")
        if not world.is_main:
            return
        given = {name: getattr(options, name) for name in ("data", "images", "masks", "names", "templates")}
        record = {
            "checkpoint": str(options.checkpoint),
            "task": options.task,
            **{name: _plain(value) for name, value in given.items() if value is not None},
            "metrics": metrics,
        }
        out.write_text(json.dumps(record, indent=1) + "\n")  # first: nobody may be there any more to print to
        print(table({options.checkpoint.name: metrics}, title=options.task))
        print(f"wrote {out}")


def _plain(value: object) -> object:
    return value if isinstance(value, list) else str(value)


def _check_options(options: argparse.Namespace, task: Task) -> None:
    for name in ("data", "images", "masks", "names", "templates", "ignore"):
        given = getattr(options, name) is not None
        if given and name not in task.needs + task.takes:
            raise InputError(f"--task {options.task} has no use for --{name}")
        if not given and name in task.needs:
            raise InputError(f"--task {options.task} needs --{name}")
    if options.batch_size < 1:
        raise InputError(f"--batch-size is {options.batch_size}, expected at least 1")


def _shards(model: TrainedModel, options: argparse.Namespace, world: World) -> Metrics:
    spec = "::".join(options.data)
    if options.names:
        classes, attributes = _read_names(options.names), None
    else:
        info = _dataset_info(spec)
        classes, attributes = info.classes, info.attributes
    listed = look_through(spec, progress=world.is_main)
    loader = _loader(model, spec, options, world, listed.most)
    with model.computing():
        metrics = evaluate(
            model.model,
            loader,
            tokenizer=model.tokenizer,
            classes=classes,
            attributes=attributes,
            text_length=model.text_length,
            region_length=model.region_length,
            device=world.device,
            progress=world.is_main,
            group=world.group,
        )
    counts = {
        "images": metrics.pop("images"),
        "skipped": float(summed(torch.tensor(loader.counts["samples_skipped"]), world.group)),
        "regions": metrics["regions"],
        "regions_skipped": listed.regions - metrics.pop("regions"),
    }
    lost = {"shards_skipped": float(listed.unreadable)} if listed.unreadable else {}  # nobody knows how many images
    return counts | lost | metrics


def _loader(model: TrainedModel, spec: str, options: argparse.Namespace, world: World, regions: int) -> Loader:
    return create_loader(
        spec,
        tokenizer=model.tokenizer,
        batch_size=options.batch_size,
        image_size=model.model.config.image_size,
        text_length=model.text_length,
        region_length=model.region_length,
        max_regions=regions,
        train=False,
        workers=options.workers,
        crop=model.crop,
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
        rank=world.rank,
        world_size=world.size,
    )


def _classification(model: TrainedModel, options: argparse.Namespace, world: World) -> Metrics:
    from cllip_fast.convert import class_folders

    templates = read_templates(options.templates or "photo")
    place = Path(options.data[0])
    if len(options.data) == 1 and place.is_dir() and not any(place.glob("*.tar")) and not any(place.glob("*/*.tar")):
        source = class_folders.read(place, options.names)
        names = list(dict.fromkeys(source.classes))
        number_of = {name: number for number, name in enumerate(names)}
        files = [(place / sample.image, number_of[sample.captions[0]]) for sample in source.samples]
        images = from_folders(model, files, group=world.group, batch=options.batch_size)
    else:
        spec = "::".join(options.data)
        names = _read_names(options.names) if options.names else _dataset_info(spec).classes
        images = from_shards(_loader(model, spec, options, world, 0), names)
    classes = class_features(model, names, templates, progress=world.is_main)
    return classification(model, images, classes, group=world.group)


def _segmentation(model: TrainedModel, options: argparse.Namespace, world: World) -> Metrics:
    names = _read_names(options.names)
    templates = read_templates(options.templates or "photo")
    classes = class_features(model, names, templates, progress=world.is_main)
    pairs = list_pairs(options.images, options.masks)
    ignore = 255 if options.ignore is None else options.ignore
    return segmentation(model, pairs, names, classes, ignore=ignore, group=world.group)


def _compositional(model: TrainedModel, options: argparse.Namespace, world: World) -> Metrics:
    from cllip_fast.convert.files import check_folder

    pairs = read_pairs([Path(path) for path in options.data], check_folder("images", options.images))
    return compositional(model, pairs, group=world.group, batch=options.batch_size)


def _dataset_info(spec: str) -> DatasetInfo:
    expand_shards(spec)  # a folder that does not exist is to be called that
    try:
        return read_dataset_info(spec)
    except InputError as error:
        raise InputError(f"{error}, or class names by --names") from error


def _read_names(path: Path) -> list[str]:
    from cllip_fast.convert.files import read_lines

    names = read_lines(path)
    if not names:
        raise InputError(f"{path} holds no names, expected one a line")
    if len(set(names)) < len(names):
        raise InputError(f"{path} holds {Counter(names).most_common(1)[0][0]!r} twice, expected distinct names")
    return names


TASKS = {
    "shards": Task(_shards, needs=("data",), takes=("names",)),
    "classification": Task(_classification, needs=("data",), takes=("names", "templates")),
    "segmentation": Task(_segmentation, needs=("images", "masks", "names"), takes=("templates", "ignore")),
    "compositional": Task(_compositional, needs=("data", "images")),
}
