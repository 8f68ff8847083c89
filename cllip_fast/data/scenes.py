"""The generated data set: scenes of coloured, textured shapes as JPEG in tar shards, with captions and exact boxes.

Three splits: `train` and `val` show only combinations of colour, texture and shape that are not held out; in `unseen`
every object is a held-out combination. A scene depends on (seed, split, index) and on nothing else.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cllip_fast.data import drawing, scene
from cllip_fast.data.folders import INFO_FILE, TOKENIZER_FILE, completed, locked, read_json
from cllip_fast.data.phrases import ALL_PHRASES, SIZES, Phrase, held_out_combinations
from cllip_fast.data.shards import ShardWriter
from cllip_fast.data.tokenizer import Tokenizer, train_bpe
from cllip_fast.errors import InputError, check_choice

SPLITS = ("train", "val", "unseen")
FORMAT = 1
JPEG_QUALITY = 90
SHARD_SIZE = 500
_VOCABULARY = 512  # every word of the captions becomes one token


def make_scenes(
    root: str | Path,
    *,
    train: int = 30_000,
    val: int = 500,
    unseen: int = 500,
    seed: int = 0,
    difficulty: str = "normal",
    processes: int | None = None,
) -> Path:
    """Write the generated data set to `root`, or return at once if `root` holds it already.

    The folder appears under its name only when it is complete. Several processes may call this for the same folder:
    one writes, the others wait.

    Args:
        root: folder to make.
        train, val, unseen: number of scenes in each split, at least 1.
        seed: chooses the scenes and the held-out combinations.
        difficulty: "normal", or "hard": more and smaller objects of less constant colours, captions that leave some
            out (`scene.DIFFICULTIES`).
        processes: how many to draw with; None takes one for each CPU. The result does not depend on it.

    Raises:
        InputError: a number is out of range, or `root` holds something else.
    """
    root = Path(root)
    counts = {"train": train, "val": val, "unseen": unseen}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}, expected at least 1 scene")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    if processes is not None and processes < 1:
        raise InputError(f"processes is {processes}, expected at least 1")
    check_choice("difficulty", difficulty, tuple(scene.DIFFICULTIES))
    info = _describe(counts, seed, difficulty)
    with locked(root):
        if (root / INFO_FILE).is_file():
            _check_same(root, info)
            return root
        with completed(root) as partial:
            _write_splits(partial, counts, seed, difficulty, processes or os.cpu_count() or 1)
            _train_tokenizer().save(partial / TOKENIZER_FILE)
            (partial / INFO_FILE).write_text(json.dumps(info, indent=1), encoding="utf-8")
    return root


def make_scene(
    seed: int, split: str, index: int, difficulty: str = "normal"
) -> tuple[np.ndarray, dict[str, Any], list[scene.SceneObject]]:
    """One scene: the picture before JPEG (uint8 [64, 64, 3]), its record, and the objects as they were drawn."""
    rng, how = np.random.default_rng([seed, 2, SPLITS.index(split), index]), scene.DIFFICULTIES[difficulty]
    objects = scene.lay_out(rng, split_phrases(seed, split), how)
    captions = scene.captions(rng, objects, how.named)
    record = {
        "captions": captions,
        "regions": [{"box": list(item.box), "text": str(item.phrase)} for item in objects],
        "width": drawing.IMAGE_SIZE,
        "height": drawing.IMAGE_SIZE,
    }
    return scene.draw(rng, objects, how), record, objects


@functools.cache
def split_phrases(seed: int, split: str) -> tuple[Phrase, ...]:
    """The phrases that the scenes of a split are made of: only held-out ones in `unseen`, none of them elsewhere."""
    held_out = held_out_combinations(seed)
    return tuple(phrase for phrase in ALL_PHRASES if (phrase.combination in held_out) == (split == "unseen"))


def _write_splits(root: Path, counts: dict[str, int], seed: int, difficulty: str, processes: int) -> None:
    shards = [
        (root / split, seed, split, difficulty, start, min(start + SHARD_SIZE, count))
        for split, count in counts.items()
        for start in range(0, count, SHARD_SIZE)
    ]
    with tqdm(total=sum(counts.values()), desc="drawing scenes", unit=" scenes") as bar:
        if processes == 1:
            for shard in shards:
                bar.update(_write_shard(shard))
            return
        # Forked workers start at once; where the system cannot fork, its default way is taken.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        with ProcessPoolExecutor(processes, multiprocessing.get_context(method)) as pool:
            for written in pool.map(_write_shard, shards):
                bar.update(written)


def _write_shard(shard: tuple[Path, int, str, str, int, int]) -> int:
    """Draw and write the scenes from `start` to `end` as one tar; the number written."""
    folder, seed, split, difficulty, start, end = shard
    with ShardWriter(folder, SHARD_SIZE, first=start // SHARD_SIZE) as writer:
        for index in range(start, end):
            pixels, record, _ = make_scene(seed, split, index, difficulty)
            jpeg = io.BytesIO()
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
            writer.write(f"{split}-{index:07d}", jpeg.getvalue(), record)
    return end - start


def _train_tokenizer() -> Tokenizer:
    """A tokenizer that knows every word a caption can hold; it needs no scene for that."""
    names = [str(phrase) for phrase in ALL_PHRASES]
    texts = [f"a {name} {where} a {name}" for name in names for where in ("left of", "right of", "above", "below")]
    return train_bpe([*texts, *(f"with a {name} and a {name}" for name in names)], _VOCABULARY)


def _describe(counts: dict[str, int], seed: int, difficulty: str) -> dict[str, Any]:
    """The content of dataset.json; equal content means equal data."""
    how = scene.DIFFICULTIES[difficulty]
    normal = difficulty == "normal"
    return {
        "name": "scenes" if normal else f"scenes-{difficulty}",
        "format": FORMAT,
        "seed": seed,
        "splits": counts,
        "generator": {
            "image_size": drawing.IMAGE_SIZE,
            "jpeg_quality": JPEG_QUALITY,
            "objects": list(how.objects),
            "sides_in_pixels": {size: list(how.sides(size)) for size in SIZES},
            "min_visible_share": scene.MIN_VISIBLE,
            "distractor_share": how.distractor_share,
            "captions": scene.CAPTION_COUNT,
            **({} if normal else {"named": how.named, "colour_shift": how.colour_shift}),
        },
        "held_out": sorted(" ".join(combination) for combination in held_out_combinations(seed)),
        "classes": [str(phrase) for phrase in ALL_PHRASES],
        "attributes": {str(phrase): phrase._asdict() for phrase in ALL_PHRASES},
    }


def _check_same(root: Path, wanted: dict[str, Any]) -> None:
    """Refuse a finished folder that holds another data set than the one asked for."""
    found = read_json(root / INFO_FILE)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise InputError(
                f"{root} holds another data set: its {key} is {_short(found.get(key))}, expected {_short(value)}; "
                "choose another folder or remove it"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
