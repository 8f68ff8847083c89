"""A signal to any rank ends the run on all of them: saved, with an exit code of its own, ready to be resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from cllip_fast.data import make_scenes
from cllip_fast.train import checkpoint, distributed, evaluation
from cllip_fast.train.config import parse
from cllip_fast.train.signals import UNFINISHED, StopRequest
from tests.launched import launch, output_of, wait_for_lines
from tests.ranks import on_ranks

MAIN = Path(__file__).parents[2] / "train" / "main.py"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "scenes", train=16, val=2, unseen=2, processes=1)


def arguments(scenes: Path, logs: Path, **options: object) -> list[str]:
    common = {"train_data": scenes / "train", "val_data": f"val={scenes / 'val'}", "logs_dir": logs, "steps": 3,
              "batch_size": 4, "losses": "clip", "log_every_n_steps": 1, "device": "cpu"} | options  # fmt: skip
    return [text for name, value in common.items() for text in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_is_a_request(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop.agreed()
    signal.raise_signal(number)
    assert stop.agreed()
    assert stop.signal == number.name


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    StopRequest()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def ask_one_rank(rank: int, world_size: int) -> list[bool]:
    stop, answers = StopRequest(dist.group.WORLD), []
    for step in range(6):
        if rank == 1 and step == 2:
            signal.raise_signal(signal.SIGUSR1)
        answers.append(stop.agreed())
    return answers


def test_all_ranks_stop_after_the_same_step_whichever_was_asked() -> None:
    assert on_ranks(2, ask_one_rank) == [[False, False, False, True, True, True]] * 2


def wait_long(rank: int, world_size: int) -> list[str]:
    """What becomes of a wait of 2.5 s for the main rank, for what it alone does and in a collective of its group."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    world = distributed.World(rank, world_size, torch.device("cpu"), group)
    world.from_main(lambda: time.sleep(2.5))
    if world.is_main:
        time.sleep(2.5)
        return ["waited"]
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        return ["waited", "timed out"]
    return ["waited", "waited"]


def test_ranks_wait_for_the_main_one_longer_than_their_collectives_may_take() -> None:
    assert on_ranks(2, wait_long) == [["waited"], ["waited", "timed out"]]


def test_under_torchrun_a_signal_to_one_worker_ends_all_and_the_next_run_goes_on(scenes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(MAIN)]
    process = launch(
        command + arguments(scenes, tmp_path, steps=4000, save_frequency=100_000, log_every_n_steps=2),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    folder = tmp_path / "scenes"
    wait_for_lines(folder / "log.jsonl", 2, process)
    workers = [each for each in psutil.Process(process.pid).children() if str(MAIN) in each.cmdline()]
    (rank_1,) = (each for each in workers if each.environ()["RANK"] == "1")
    rank_1.send_signal(signal.SIGUSR1)
    output = output_of(process)
    assert process.returncode == 1, output  # torchrun's word for every failure
    assert f"exitcode  : {UNFINISHED}" in output
    assert "stopped by another rank after step" in output
    assert (folder / "stopped").read_text().startswith("a signal to another rank, step ")
    assert not (folder / "results.json").exists()
    step = checkpoint.read(checkpoint.find("latest", folder / "checkpoints"))["step"]
    assert train(scenes, tmp_path, steps=step + 1, resume="latest", batch_size=8)
    assert json.loads((folder / "results.json").read_text())["step"] == step + 1
    assert not (folder / "stopped").exists()


def train(scenes: Path, logs: Path, **options: object) -> bool:
    from cllip_fast.train.main import train

    with distributed.start("cpu") as world:
        return train(parse(arguments(scenes, logs, **options)), world)


def test_a_signal_during_the_last_evaluation_leaves_a_run_that_can_be_finished(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = evaluation.evaluate

    def signalled(*args: object, **kwargs: object) -> dict:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", signalled)
    assert train(scenes, tmp_path) is False
    assert (tmp_path / "scenes" / "stopped").read_text() == "SIGTERM, step 3\n"
    assert "evaluation of step 3 was broken off by SIGTERM" in capsys.readouterr().out
    assert not (tmp_path / "scenes" / "results.json").exists()
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert train(scenes, tmp_path, resume="latest") is True
    assert (tmp_path / "scenes" / "results.json").exists()
