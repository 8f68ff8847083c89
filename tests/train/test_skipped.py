"""Steps that are not finite: written down with every rank's keys; past the limit, or with broken weights, the end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cllip_fast.errors import InputError
from cllip_fast.train.distributed import World
from cllip_fast.train.skipped import SkippedSteps
from tests.ranks import on_ranks

ALONE = World(0, 1, torch.device("cpu"), None)


def create(file: Path, limit: int = 3, world: World = ALONE, start: int = 0) -> SkippedSteps:
    return SkippedSteps(file, limit, start, nn.Linear(2, 2), world, print)


def add(skipped: SkippedSteps, step: int, bad: bool, rank: int = 0) -> None:
    batches = [SimpleNamespace(keys=[f"{step}-{rank}-{number}"]) for number in range(2)]  # two micro-batches
    losses = {"a_loss": torch.tensor(float("inf") if bad else 1.0), "b_loss": torch.tensor(0.5)}
    skipped.add(step, batches, losses, torch.tensor([float(bad)]))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_only_steps_in_a_row_count_towards_the_limit(tmp_path: Path) -> None:
    skipped = create(tmp_path / "skipped.jsonl")
    for step, bad in enumerate([True, True, False, True, True], 1):
        add(skipped, step, bad)
    skipped.check()
    assert [line["step"] for line in lines(skipped.file)] == [1, 2, 4, 5]
    assert lines(skipped.file)[0] == {
        "step": 1,
        "losses": {"a_loss": "inf", "b_loss": "0.5"},
        "keys": [["1-0-0", "1-0-1"]],
    }
    add(skipped, 6, True)  # the row goes on from one interval into the next
    with pytest.raises(InputError, match="3 steps in a row, up to step 6"):
        skipped.check()


def test_the_limit_is_reached_within_an_interval_that_ends_well(tmp_path: Path) -> None:
    skipped = create(tmp_path / "skipped.jsonl", limit=2)
    for step, bad in enumerate([True, True, False], 1):
        add(skipped, step, bad)
    with pytest.raises(InputError, match="2 steps in a row, up to step 2"):
        skipped.check()


def test_finite_steps_leave_no_file_and_a_resumed_run_repeats_none(tmp_path: Path) -> None:
    skipped = create(tmp_path / "skipped.jsonl")
    add(skipped, 1, False)
    skipped.check()
    skipped.check()
    assert not skipped.file.exists()
    for step in (2, 5):
        add(skipped, step, True)
    skipped.check()
    again = create(skipped.file, start=4)
    assert [line["step"] for line in lines(again.file)] == [2]


def test_a_broken_parameter_is_named(tmp_path: Path) -> None:
    skipped = create(tmp_path / "skipped.jsonl", limit=100)
    with torch.no_grad():
        skipped.model.bias[1] = float("nan")
    add(skipped, 7, True)
    with pytest.raises(InputError, match="first bias, and no step can mend them; step 7"):
        skipped.check()


def check_on_rank(rank: int, world_size: int, file: str) -> str:
    skipped = create(Path(file), limit=2, world=World(rank, world_size, torch.device("cpu"), dist.group.WORLD))
    for step, bad in enumerate([False, True, True], 1):
        add(skipped, step, bad, rank)
    try:
        skipped.check()
    except InputError as error:
        return str(error)
    return ""


def test_keys_of_every_rank_are_saved_and_all_ranks_end(tmp_path: Path) -> None:
    file = tmp_path / "skipped.jsonl"
    said = on_ranks(2, check_on_rank, str(file))
    assert said[0] == said[1]
    assert "2 steps in a row" in said[0]
    assert [line["keys"] for line in lines(file)] == [
        [[f"{step}-{rank}-0", f"{step}-{rank}-1"] for rank in range(2)] for step in (2, 3)
    ]
