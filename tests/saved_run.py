"""A run that trained nothing: a small random model, its data and tokenizer, saved by the trainer's own code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image

from cllip_fast.data import create_loader, train_bpe
from cllip_fast.models import CllipModel, create_model
from cllip_fast.train.checkpoint import Checkpoints
from cllip_fast.train.config import Config
from tests.data.painted import record, write_shard

CLASSES = ["red circle", "blue star", "green ring", "a large white dotted diamond"]
LENGTHS = {"text_length": 16, "region_length": 8}
SIZES = {
    "wide": (300, 220),
    "tall": (90, 110),
    "square": (40, 40),
}  # the first is decoded at half its size, for side 32


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse coloured noise, which resizing does not wipe out."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(cells.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def regions(width: int, height: int) -> list[dict[str, object]]:
    """Boxes in pixels, one of which reaches to the long side's edge, so that a centred crop cuts it."""
    shares = [(0.3, 0.2, 0.6, 0.7), (0.0, 0.4, 0.55, 0.9), (0.45, 0.1, 0.8, 0.65), (0.2, 0.15, 0.75, 0.85)]
    scale = (width, height, width, height)
    boxes = [[share * size for share, size in zip(box, scale, strict=True)] for box in shares]
    return [{"box": box, "text": text} for box, text in zip(boxes, CLASSES, strict=True)]


def save_run(
    root: Path,
    *,
    crop: str = "pad",
    region: str = "prompter",
    losses: str = "clip,region,grounding",
    steps: tuple[int, ...] = (3,),
) -> Path:
    """Write `root/data` with its pictures (`<name>.jpg`) and `root/runs/tiny`; returns the latter.

    The checkpoint of each step holds other random weights.
    """
    data = root / "data"
    samples = []
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        file = io.BytesIO()
        picture(width, height, seed).save(file, "JPEG", quality=90)
        captions = [f"a {CLASSES[seed]} of a {name} picture"]
        samples.append(
            (name, file.getvalue(), record(width, height, captions=captions, regions=regions(width, height)))
        )
    write_shard(data / "train", samples)
    for name, jpeg, _ in samples:
        (data / f"{name}.jpg").write_bytes(jpeg)
    tokenizer = train_bpe([*CLASSES, "a picture"], 280)
    tokenizer.save(data / "tokenizer.json")
    (data / "dataset.json").write_text(json.dumps({"name": "noise", "classes": CLASSES}))
    config = Config(train_data=str(data / "train"), crop=crop, region=region, losses=losses, **LENGTHS)
    loader = create_loader(
        data / "train", tokenizer=tokenizer, batch_size=2, image_size=32, max_regions=4, train=True, **LENGTHS
    )
    for step in steps:
        torch.manual_seed(step)
        model = small_model(tokenizer.vocab_size, region)
        optimizer = torch.optim.AdamW(model.parameters())
        Checkpoints(root / "runs" / "tiny" / "checkpoints", config, model, optimizer, loader).save(step)
    return root / "runs" / "tiny"


def small_model(vocab_size: int, region: str = "prompter") -> CllipModel:
    """One layer a tower; the grounding head starts with weights large enough that phrases differ."""
    sizes = {"embed_dim": 16, "vision_width": 32, "vision_depth": 1, "text_width": 32, "text_depth": 1}
    model = create_model("tiny", image_size=32, vocab_size=vocab_size, text_length=16, region=region, **sizes)
    if model.prompter is not None:
        for parameter in model.prompter.box_head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
