"""Checkpoints that are cut, flipped, killed in the writing, refused room or permission; signals that ask for one."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError
from cllip_fast.models import PRESETS
from cllip_fast.train import checkpoint, distributed
from cllip_fast.train.checkpoint import Checkpoints
from cllip_fast.train.config import Config, parse
from tests.ranks import on_ranks


class Small(nn.Linear):
    """A model as far as checkpoints look at one."""

    config = PRESETS["tiny"]


class Place:
    """A loader as far as checkpoints look at one."""

    def __init__(self) -> None:
        self.samples = 0

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples = state["samples"]


def create(folder: Path, *, width: int = 8, seed: int = 0, **options: object) -> Checkpoints:
    """A run that has made one step of AdamW, so that there are moments to save."""
    torch.manual_seed(seed)
    model = Small(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, width)).sum().backward()
    optimizer.step()
    return Checkpoints(folder, Config(**options), model, optimizer, Place())


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = create(tmp_path, seed=1)
    saved.loader.samples = 96
    path = saved.save(7)
    draws = [random.random(), np.random.rand(), torch.rand(3)]
    restored = create(tmp_path, seed=2)
    random.seed(5)
    np.random.seed(5)
    assert restored.restore(path) == 7
    assert same([random.random(), np.random.rand(), torch.rand(3)], draws)
    assert restored.loader.samples == 96
    assert same(restored.model.state_dict(), saved.model.state_dict())
    assert same(restored.optimizer.state_dict(), saved.optimizer.state_dict())


@pytest.mark.gpu
def test_the_gpu_goes_on_drawing_where_it_was() -> None:
    torch.rand(5, device="cuda")
    state = checkpoint.random_state()
    draws = torch.rand(5, device="cuda")
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), draws)


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = create(tmp_path).save(1)
    whole = path.read_bytes()
    for size in [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"step_00000001\.pt cannot be read"):
            checkpoint.read(path)


def test_a_flipped_bit_is_refused_or_without_effect(tmp_path: Path) -> None:
    path = create(tmp_path).save(1)
    whole, state = path.read_bytes(), checkpoint.read(path)
    refused, rng = 0, random.Random(0)
    for _ in range(200):  # the archive's padding and unused header fields are not part of any record
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(checkpoint.read(path), state)
        except InputError:
            refused += 1
    assert refused > 20


def test_a_flipped_bit_of_a_weight_is_named(tmp_path: Path) -> None:
    """PyTorch alone loads this file without a word."""
    run = create(tmp_path)
    path = run.save(1)
    whole, weight = bytearray(path.read_bytes()), run.model.weight.detach().numpy().tobytes()
    whole[whole.index(weight) + 20] ^= 1
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], run.model.weight)
    with pytest.raises(InputError, match="wrong checksum of its record"):
        checkpoint.read(path)


def test_latest_skips_the_damaged_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = create(tmp_path)
    paths = [run.save(step) for step in (1, 2, 3)]
    assert checkpoint.find("latest", tmp_path) == paths[2]
    assert not caplog.records
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find("latest", tmp_path) == paths[1]
    assert "step_00000003.pt cannot be read: BadZipFile" in caplog.text
    assert "step_00000002" not in caplog.text
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"finds no checkpoint in .*; 3 cannot be used"):
        checkpoint.find("latest", tmp_path)


def test_later_steps_do_not_crowd_out_what_was_just_saved(tmp_path: Path) -> None:
    run = create(tmp_path, keep=1)
    run.save(8).write_bytes(b"damaged")
    assert run.save(6).exists()
    assert checkpoint.find("latest", tmp_path) == tmp_path / "step_00000006.pt"
    run.save(9)
    assert [path.name for path in checkpoint.stored(tmp_path)] == ["step_00000009.pt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_that_cannot_grow_leaves_the_earlier_ones(tmp_path: Path) -> None:
    """The system cuts the file short in the middle of `torch.save`, which then reports an error of its own."""
    run = create(tmp_path, width=128)
    run.save(1)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["step_00000001.pt"]) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=r"step_00000002\.pt .*cannot be written: File too large"):
            run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    assert run.save(2).exists()  # once there is room again


def test_a_full_disk_that_shows_only_on_syncing_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(tmp_path, keep=1)
    run.save(1)
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(InputError, match=r"step_00000002\.pt .*No space left on device"):
            run.save(2)
    assert contents(tmp_path) == before


def test_an_error_that_is_not_the_disks_is_not_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="CUDA error"):
        create(tmp_path).save(1)
    assert not contents(tmp_path)


def test_prepare_removes_left_overs_and_nothing_else(tmp_path: Path) -> None:
    run = create(tmp_path / "new" / "folder")
    run.prepare()
    path = run.save(1)
    (path.parent / "step_00000002.tmp").write_bytes(b"killed while writing")
    (path.parent / "notes.txt").write_text("mine")
    run.prepare()
    assert set(contents(path.parent)) == {"step_00000001.pt", "notes.txt"}


def test_prepare_refuses_a_folder_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path)
    assert run.size() == 3 * 4 * (8 * 8 + 8)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=run.size() - 1))
    with pytest.raises(InputError, match="GB free, a checkpoint needs"):
        run.prepare()


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/checkpoints .*cannot be written: Not a directory"):
        create(tmp_path / "file" / "checkpoints").prepare()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder; the next test simulates it")
def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written: Permission denied"):
            create(tmp_path).prepare()
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_file_system_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
    with pytest.raises(InputError, match="cannot be written: Read-only file system"):
        create(tmp_path).prepare()


MOMENTS = {
    "writing": (torch, "save"),
    "syncing": (os, "fsync"),
    "renaming": (os, "replace"),
    "renamed": (checkpoint, "sync_folder"),
    "pruning": (checkpoint, "stored"),
}


def die(*arguments: object) -> None:
    if len(arguments) == 2 and hasattr(arguments[1], "write"):  # in place of torch.save: half a file
        arguments[1].write(bytes(100_000))
        arguments[1].flush()
    os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(folder: Path, step: int, moment: str, done: Connection) -> None:
    """Save step after step and report each; with a `moment`, die by SIGKILL there in the second save."""
    run = create(folder, width=512, keep=2)
    for number in range(step, step + 1000):
        if number == step + 1 and moment:
            setattr(*MOMENTS[moment], die)
        run.save(number)
        done.send(number)


@pytest.mark.parametrize("moments", [list(MOMENTS), [""] * 6], ids=["chosen", "random"])
def test_sigkill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, moments: list[str]) -> None:
    context, rng, last = multiprocessing.get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(["cllip_fast.train.checkpoint", "cllip_fast.losses", "torch._dynamo"])
    for moment in moments:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=save_until_killed, args=(tmp_path, last + 1, moment, send))
        child.start()
        send.close()
        last = receive.recv()  # the first save is through
        if not moment:
            time.sleep(rng.uniform(0, 0.1))
            child.kill()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        while receive.poll():
            try:
                last = receive.recv()
            except EOFError:
                break
        for path in checkpoint.stored(tmp_path):  # none is half-written, and none that was reported is lost
            assert checkpoint.read(path, mmap=True)["step"] == int(path.stem[5:])
        newest = int(checkpoint.find("latest", tmp_path).stem[5:])
        assert newest in (last, last + 1)
        assert moment in ("", "renamed", "pruning") or newest == last
        last = newest


def find_on_each(rank: int, world_size: int, folder: str) -> str:
    world = distributed.World(rank, world_size, torch.device("cpu"), torch.distributed.group.WORLD)
    mine = Path(folder) / str(rank)  # a folder of its own: what counts is the main rank's
    try:
        return str(world.from_main(lambda: checkpoint.find("latest", mine)))
    except InputError as error:
        return f"refused: {error}"


def test_all_ranks_resume_from_what_the_main_rank_finds(tmp_path: Path) -> None:
    path = create(tmp_path / "0").save(4)
    create(tmp_path / "1").save(8)
    assert on_ranks(2, find_on_each, str(tmp_path)) == [str(path)] * 2
    path.unlink()
    refused = f"refused: --resume latest finds no checkpoint in {path.parent}"
    assert on_ranks(2, find_on_each, str(tmp_path)) == [refused] * 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "scenes", train=12, val=2, unseen=2, processes=1)


def train(scenes: Path, logs: Path, **options: object) -> Path:
    """Three steps of the trainer; the folder of their checkpoints."""
    from cllip_fast.train.main import train

    common = {"train_data": scenes / "train", "val_data": f"val={scenes / 'val'}", "logs_dir": logs, "steps": 3,
              "batch_size": 4, "losses": "clip", "log_every_n_steps": 1, "device": "cpu"} | options  # fmt: skip
    config = parse([text for name, value in common.items() for text in ("--" + name.replace("_", "-"), str(value))])
    with distributed.start("cpu") as world:
        train(config, world)
    return logs / config.name / "checkpoints"


def test_a_failed_save_is_a_warning_unless_it_ends_the_run(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, failing = Checkpoints.save, {2}

    def sometimes(self: Checkpoints, step: int, **options: bool) -> Path:
        if step in failing:
            raise InputError(f"step {step} cannot be written: No space left on device")
        return save(self, step, **options)

    monkeypatch.setattr(Checkpoints, "save", sometimes)
    folder = train(scenes, tmp_path, save_frequency=1)
    assert [path.name for path in checkpoint.stored(folder)] == ["step_00000001.pt", "step_00000003.pt"]
    assert "step 2 cannot be written: No space left on device; the run goes on" in capsys.readouterr().out
    failing.add(3)
    with pytest.raises(InputError, match="step 3 cannot be written"):
        train(scenes, tmp_path, save_frequency=1)


def test_a_run_that_cannot_write_ends_before_its_first_step(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllip_fast.train import main as trainer

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(trainer, "forward", lambda *arguments: pytest.fail("a step was made"))
    with pytest.raises(InputError, match="cannot be written"):
        train(scenes, tmp_path / "file")
