"""The trainer evaluates on all ranks at once: metrics of one process, one signal for all, training left alone."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cllip_fast.data import Batch, Loader, make_scenes
from cllip_fast.errors import InputError
from cllip_fast.models import PRESETS
from cllip_fast.train import distributed, evaluation, parallel
from cllip_fast.train.config import parse
from cllip_fast.train.evaluation import Evaluation
from cllip_fast.train.inputs import create_inputs
from cllip_fast.train.logs import create_log
from cllip_fast.train.main import build_model
from cllip_fast.train.signals import StopRequest
from tests.ranks import on_ranks
from tests.train.test_parallel import SMALL, arguments


def make(root: Path, val: int, broken: int) -> Path:
    """Scenes of which one image to evaluate on cannot be read."""
    make_scenes(root, train=8, val=val, unseen=1, processes=1)
    (shard,) = (root / "val").glob("*.tar")
    data, start = bytearray(shard.read_bytes()), -1
    for _ in range(broken + 1):
        start = data.index(b"\xff\xd8\xff", start + 1)
    data[start : start + 300] = bytes(300)
    shard.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, taken one at a time: the second, which is broken, is all that the second of three ranks gets."""
    return make(tmp_path_factory.mktemp("scenes") / "scenes", val=4, broken=1)


def flags(scenes: Path, logs: Path, **options: object) -> list[str]:
    return arguments(scenes, logs, batch_size=1, val_data=f"val={scenes / 'val'}", **options)


def create(rank: int, world_size: int, flags: list[str], timeout: float = 600) -> Evaluation:
    """An evaluation of a model with its first weights."""
    PRESETS["tiny"] = replace(PRESETS["tiny"], **SMALL)
    group = dist.group.WORLD if world_size > 1 else None
    world = distributed.World(rank, world_size, torch.device("cpu"), group, group and dist.new_group(), timeout)
    config = parse(flags)
    run, inputs = Path(config.logs_dir) / config.name, create_inputs(config, world)
    # Blocks are gathered for training in bf16; evaluation is to have the weights themselves.
    model = parallel.shard(build_model(config, inputs.tokenizer.vocab_size), config, world, torch.bfloat16)
    return Evaluation(model, inputs, config, world, create_log(run, config, 0, world), run, StopRequest(world.patient))


def evaluate_and_stop(rank: int, world_size: int, *runs: list[str]) -> list[dict[str, object]]:
    """What a rank gets of two evaluations of each run, and of a third in which the last rank alone has had a signal."""
    gathered, taken, answers = [], [], []
    gather, iterate = parallel.get_model_state_dict, Loader.__iter__
    parallel.get_model_state_dict = lambda *args, **kwargs: gathered.append(1) or gather(*args, **kwargs)
    Loader.__iter__ = lambda self: (taken.append(1) or batch for batch in iterate(self))
    for flags in runs:
        made = create(rank, world_size, flags)
        gathered.clear()
        before = torch.get_rng_state(), made.inputs.train.state_dict()
        metrics, finished = made.evaluate(1)["val"], made.finish(2, 0.0)
        after = torch.get_rng_state(), made.inputs.train.state_dict()
        taken.clear()
        if rank == world_size - 1:
            signal.raise_signal(signal.SIGUSR1)
        answers.append(
            {
                "metrics": metrics,
                "finished": finished,
                "untouched": torch.equal(before[0], after[0]) and before[1] == after[1],
                "finished after a signal": made.finish(3, 0.0),
                "batches after a signal": len(taken),
                "gathered": len(gathered),
            }
        )
    return answers


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | None]:
    """The metrics of one process. Where no image can be read there is no picture, and all else goes on."""
    logs = tmp_path_factory.mktemp("alone")
    empty = make(logs / "empty", val=1, broken=0)
    ((one, none),) = on_ranks(1, evaluate_and_stop, flags(scenes, logs / "one"), flags(empty, logs / "none"))
    assert [answer["finished"] for answer in (one, none)] == [True, True]
    assert [answer["finished after a signal"] for answer in (one, none)] == [False, False]
    assert (one["metrics"]["images"], none["metrics"]["images"]) == (3, 0)
    assert (logs / "one" / "scenes" / "sheet_val.png").exists()
    assert not (logs / "none" / "scenes" / "sheet_val.png").exists()
    return one["metrics"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_evaluate_as_one(scenes: Path, tmp_path: Path, alone: dict[str, float | None], ranks: int) -> None:
    ways = ("ddp", "fsdp")
    of_ranks = on_ranks(ranks, evaluate_and_stop, *(flags(scenes, tmp_path / way, parallel=way) for way in ways))
    for way, answers in zip(ways, zip(*of_ranks, strict=True), strict=True):
        for answer in answers:
            assert answer["metrics"] == pytest.approx(alone, abs=1e-6)
            assert answer["finished"]
            assert answer["untouched"]
            assert not answer["finished after a signal"]
            assert answer["gathered"] == (3 if way == "fsdp" else 0), "once an evaluation"
        assert answers[0]["batches after a signal"] == 1, "of two: all ranks break off with the one that was asked"
        run = tmp_path / way / "scenes"
        assert json.loads((run / "results.json").read_text())["results"]["val"] == pytest.approx(alone, abs=1e-6)
        assert (run / "sheet_val.png").exists()
        assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]


def hang(rank: int, world_size: int, flags: list[str], named: str) -> str:
    """Rank 1 comes to no vote; what rank 0 says."""
    made = create(rank, world_size, flags, timeout=3)

    def stuck(loader: Loader) -> Iterator[Batch]:
        while not Path(named).exists():
            time.sleep(0.05)
        raise evaluation.Interrupted
        yield

    if rank == 1:
        made._until_stopped = stuck
    try:
        made.evaluate(1)
    except InputError as error:
        Path(named).touch()
        return str(error)
    return ""


def test_a_rank_that_hangs_in_an_evaluation_is_named(scenes: Path, tmp_path: Path) -> None:
    message, _ = on_ranks(2, hang, flags(scenes, tmp_path), str(tmp_path / "named"))
    assert "a rank hangs or is gone, --timeout is 3 s" in message
    assert "Ranks 1 failed" in message
