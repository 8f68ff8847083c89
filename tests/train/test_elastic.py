"""A worker that is killed is restarted by torchrun and goes on from the last checkpoint; one that hangs is named."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError
from cllip_fast.train import checkpoint, distributed
from cllip_fast.train.config import parse
from cllip_fast.train.main import train
from tests.launched import launch, output_of
from tests.ranks import on_ranks
from tests.train.test_parallel import arguments, curve, values

DYING = """
import os, signal
from cllip_fast.train import main as trainer

forward, calls = trainer.forward, []

def dying(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*arguments)

trainer.forward = dying
trainer.main()
"""


def test_a_killed_worker_is_restarted_and_the_run_goes_on(tmp_path: Path) -> None:
    scenes = make_scenes(tmp_path / "scenes", train=40, val=1, unseen=1, processes=1)
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    common = {"losses": "clip", "image_size": 32, "save_frequency": 1}
    flags = arguments(scenes, tmp_path / "two", batch_size=4, parallel="fsdp", resume="auto", **common)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
               str(script), *flags]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", distributed.OWN_STORE: "1"}
    process = launch(command, env=environment)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "writing to" in output  # the first start found no checkpoint
    assert "going on after step" in output
    with distributed.start("cpu") as world:
        train(parse(arguments(scenes, tmp_path / "one", **common)), world)
    assert values(curve(tmp_path / "two" / "scenes")) == curve(tmp_path / "one" / "scenes")


def test_restarts_without_a_store_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(distributed.OWN_STORE, raising=False)
    with pytest.raises(InputError, match=f"start torchrun with {distributed.OWN_STORE}=1"), distributed.start("cpu"):
        pass


def test_auto_starts_afresh_only_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.find("auto", tmp_path / "absent") is None
    (tmp_path / "step_00000001.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"--resume auto finds no checkpoint .* 1 cannot be used"):
        checkpoint.find("auto", tmp_path)


def hang(rank: int, world_size: int, folder: str, where: str) -> str:
    """Rank 1 never comes to a collective, or to the roll call; what the others say."""
    named = Path(folder) / where
    group = dist.new_group(timeout=timedelta(seconds=3))
    world = distributed.World(rank, world_size, torch.device("cpu"), group, dist.new_group(), 3)
    dist.barrier()
    if rank == 1:
        while not named.exists():
            time.sleep(0.05)
        return ""
    try:
        with distributed.named_hangs(world):
            if where == "collective":
                dist.all_reduce(torch.ones(1), group=group)
            world.roll_call()
    except InputError as error:
        message = str(error)
    if rank == 0:
        named.touch()
    return message


@pytest.mark.parametrize("where", ["collective", "roll_call"])
def test_a_rank_that_hangs_is_named(tmp_path: Path, where: str) -> None:
    messages = on_ranks(3, hang, str(tmp_path), where)
    assert "a rank hangs or is gone, --timeout is 3 s" in messages[0]
    assert "Ranks 1 failed" in messages[0]
    assert "rank 0" in messages[2].lower()


def fail(rank: int, world_size: int) -> None:
    world = distributed.World(rank, world_size, torch.device("cpu"), dist.group.WORLD, dist.new_group(), 30)
    with pytest.raises(RuntimeError, match="out of memory"), distributed.named_hangs(world):  # nobody is waited for
        raise RuntimeError("out of memory")


def test_other_errors_blame_nobody() -> None:
    on_ranks(2, fail)
