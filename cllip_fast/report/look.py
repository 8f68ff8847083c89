"""The model looks at a part of each split again: what the page draws and sorts. Says what could not be had, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from cllip_fast.data import Batch, create_loader, expand_shards
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD
from cllip_fast.errors import InputError
from cllip_fast.evaluate.listing import look_through
from cllip_fast.inference import TrainedModel, load
from cllip_fast.report.attention import Look, look_at_boxes, look_for_texts
from cllip_fast.report.failures import (
    BoxFailure,
    ImageFailure,
    RegionFailure,
    worst_boxes,
    worst_images,
    worst_regions,
)
from cllip_fast.report.run import Run
from cllip_fast.report.sample import Sample, first_batches, take_sample
from cllip_fast.show.sheet import Answer, ask, to_pictures
from cllip_fast.train.inputs import name_splits

BATCH_SIZE = 16
SHOWN = 6  # images of a split with boxes and maps
LOOKS = 4  # images of a split with attention
PHRASES = 2  # of each of them


@dataclass(frozen=True)
class Shown:
    """An image with what the model answers about its phrases."""

    picture: Image.Image
    caption: str
    answers: list[Answer]


@dataclass(frozen=True)
class Looked:
    """A phrase of an image, with the attention of its box's and of its own prompt; None where they are untrained."""

    picture: Image.Image
    answer: Answer
    box: Look | None
    text: Look | None


@dataclass(frozen=True)
class SplitFindings:
    """What was found in a split of `total` samples; failures come with the highest loss first."""

    name: str
    total: int
    sample: Sample
    skipped: Counter[str]
    shown: list[Shown]
    looks: list[Looked]
    images: list[ImageFailure]
    regions: list[RegionFailure]
    boxes: list[BoxFailure]


@dataclass
class Findings:
    """Of all splits that could be read.

    Attributes:
        grounds: whether boxes are predicted.
        model: what it is, in a line; empty where it was not loaded.
        specs: the splits' shards by name, read or not.
        notes: one for each part that is missing.
        untrained: which parts of the model have nothing to show, and why.
    """

    splits: list[SplitFindings] = field(default_factory=list)
    grounds: bool = False
    model: str = ""
    specs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)


def look_again(run: Run, *, samples: int, device: str | None) -> Findings:
    """Evaluate the first `samples` of each split with the run's newest checkpoint.

    Without a checkpoint, or for splits whose shards are not there, notes take the findings' place.

    Raises:
        InputError: a checkpoint, tokenizer or device that cannot be used.
    """
    findings = Findings(specs=name_splits(run.config))
    missing = "No new pictures, failures and attention"
    if run.checkpoint is None:
        findings.notes.append(f"{missing}: the run has no checkpoint")
        return findings
    if not findings.specs:
        findings.notes.append(f"{missing}: the run names no data to evaluate on (--val-data)")
    readable = {}
    for name, spec in findings.specs.items():
        try:
            expand_shards(spec)
            readable[name] = spec
        except InputError as error:
            findings.notes.append(f"{missing} of {name}: {error} (relative paths start in the present folder)")
    if not readable:
        return findings
    model = load(run.folder, device=device)
    findings.model = model.model.describe()
    regions = "region" in run.config.parts or model.model.prompter is None
    findings.grounds = "grounding" in run.config.parts and model.model.prompter is not None
    findings.untrained = _untrained(regions, findings.grounds, has_prompter=model.model.prompter is not None)
    for name, spec in readable.items():
        try:
            split = _look_at_split(model, run, name, spec, samples=samples, regions=regions, grounds=findings.grounds)
        except InputError as error:
            findings.notes.append(f"{missing} of {name}: {error}")
        else:
            findings.splits.append(split)
    return findings


def _untrained(regions: bool, grounds: bool, *, has_prompter: bool) -> list[str]:
    if not has_prompter:
        return ["This run reads regions by RoIAlign: it has no Prompter, predicts no boxes and attends to no prompts."]
    lines = []
    if not regions:
        lines.append("This run did not train the region loss: its features of boxes are not shown.")
    if not grounds:
        lines.append("This run did not train the grounding loss: its boxes of phrases are not shown.")
    return lines


def _look_at_split(
    model: TrainedModel, run: Run, name: str, spec: str, *, samples: int, regions: bool, grounds: bool
) -> SplitFindings:
    loader = create_loader(
        spec,
        tokenizer=model.tokenizer,
        batch_size=min(BATCH_SIZE, samples),
        image_size=model.model.config.image_size,
        text_length=model.text_length,
        region_length=model.region_length,
        max_regions=look_through(spec).most,
        train=False,
        crop=model.crop,
    )
    total = min(samples, loader.samples)
    sample = take_sample(model, first_batches(loader, samples), total=total, name=name)
    skipped = Counter(loader.skipped)
    shown, looks = _look_at_first(model, next(iter(loader)), regions=regions, grounds=grounds)
    clip = model.model
    local = clip.local_logit_scale
    return SplitFindings(
        name,
        loader.samples,
        sample,
        skipped,
        shown,
        looks,
        worst_images(sample, clip.logit_scale.exp().item()),
        worst_regions(sample, local.exp().item()) if regions else [],
        worst_boxes(sample, run.config.grounding) if grounds else [],
    )


@torch.no_grad()
def _look_at_first(
    model: TrainedModel, batch: Batch, *, regions: bool, grounds: bool
) -> tuple[list[Shown], list[Looked]]:
    """The first images with their maps and boxes, and the attention for some of their phrases."""
    clip, shown, looks = model.model, [], []
    pictures = to_pictures(batch.images[:SHOWN], CLIP_MEAN, CLIP_STD)
    for i, picture in enumerate(pictures):
        with model.computing():
            answers = ask(clip, batch, i, model.tokenizer, model.region_length)
        if not grounds:
            answers = [replace(answer, predicted=None, iou=None) for answer in answers]
        shown.append(Shown(picture, batch.captions[i][0] if batch.captions[i] else "(no caption)", answers))
        asked = answers[:PHRASES]
        if clip.prompter is None or i >= LOOKS or not asked or not (regions or grounds):
            continue
        texts = model.encode_phrases([answer.phrase for answer in asked])
        with model.computing():
            tokens = clip.image_tokens(batch.images[i : i + 1].to(model.device))
            boxes = torch.stack([answer.boxes[0] for answer in asked]).to(model.device)
            of_boxes = look_at_boxes(clip, tokens, boxes) if regions else [None] * len(asked)
            of_texts = look_for_texts(clip, tokens, texts) if grounds else [None] * len(asked)
        looks += [Looked(picture, *each) for each in zip(asked, of_boxes, of_texts, strict=True)]
    return shown, looks
