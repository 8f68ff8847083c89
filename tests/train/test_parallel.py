"""DDP, FSDP2 and HSDP through the trainer: one process, its curve and its weights; checkpoints from any to any."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cllip_fast
from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError
from cllip_fast.interchange import load_model
from cllip_fast.models import PRESETS
from cllip_fast.train import checkpoint, distributed, sharded_checkpoint
from cllip_fast.train.config import parse
from cllip_fast.train.main import train
from tests.ranks import on_ranks

BATCH = 8  # of all ranks
TIMEOUT = 300  # seconds; hundreds of small collectives, in which ranks that share few cores wait for their turn
SMALL = {"image_size": 32, "embed_dim": 16, "vision_width": 32, "vision_depth": 2, "text_width": 32, "text_depth": 1}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "scenes", train=40, val=4, unseen=1, processes=1)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], **SMALL))
        yield


def arguments(scenes: Path, logs: Path, **options: object) -> list[str]:
    # AdamW with a large eps: steps in proportion to the gradient, so that rounding stays rounding.
    common = {"train_data": scenes / "train", "logs_dir": logs, "steps": 4, "warmup": 2, "log_every_n_steps": 1,
              "save_frequency": 2, "batch_size": BATCH, "losses": "clip,region,grounding", "eps": 1e-2,
              "device": "cpu"}  # fmt: skip
    return [text for name, value in (common | options).items() for text in ("--" + name.replace("_", "-"), str(value))]


def run_rank(rank: int, world_size: int, flags: list[str]) -> None:
    PRESETS["tiny"] = replace(PRESETS["tiny"], **SMALL)
    group = dist.group.WORLD
    train(parse(flags), distributed.World(rank, world_size, torch.device("cpu"), group, dist.new_group(), TIMEOUT))


def run(scenes: Path, logs: Path, ranks: int = 1, **options: object) -> Path:
    """Train on so many ranks with the same global batch; returns the run's folder."""
    micro_batches = int(options.get("accum_freq", 1))
    flags = arguments(scenes, logs, **({"batch_size": BATCH // ranks // micro_batches} | options))
    if ranks == 1:
        with distributed.start("cpu") as world:
            train(parse(flags), world)
    else:
        on_ranks(ranks, run_rank, flags, timeout=TIMEOUT)
    return logs / "scenes"


def curve(folder: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        pytest.approx((line["loss"], line["grad_norm"], line["logit_scale"], line["region_logit_scale"]), rel=2e-4)
        for line in lines
        if "loss" in line
    ]


def values(approximations: list) -> list[tuple[float, ...]]:
    return [each.expected for each in approximations]


def last(folder: Path) -> dict:
    return checkpoint.read(checkpoint.find("latest", folder / "checkpoints"))


def assert_same_run(folder: Path, wanted: Path, atol: float = 2e-6) -> None:
    """The same curve to rounding, and the same weights, moments and place in the data at its end."""
    assert values(curve(folder)) == curve(wanted)
    assert len(curve(wanted)) == 4
    mine, other = last(folder), last(wanted)
    assert mine["step"] == other["step"] == 4
    torch.testing.assert_close(mine["model"], other["model"], rtol=0, atol=atol)
    torch.testing.assert_close(mine["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=50 * atol)
    assert mine["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert mine["loader"] == other["loader"]
    assert torch.equal(mine["random"]["torch"], other["random"]["torch"])


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(scenes, tmp_path_factory.mktemp("alone"), val_data=f"val={scenes / 'val'}")


@pytest.fixture(scope="module")
def sharded(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluated after every step, `alone` only at its end."""
    options = {"parallel": "fsdp", "val_data": f"val={scenes / 'val'}", "eval_frequency": 1}
    return run(scenes, tmp_path_factory.mktemp("fsdp"), ranks=4, **options)


def test_four_sharded_ranks_are_one_process(alone: Path, sharded: Path) -> None:
    assert_same_run(sharded, alone)
    assert [path.name for path in checkpoint.stored(sharded / "checkpoints")] == ["step_00000002", "step_00000004"]
    assert len(list((sharded / "checkpoints" / "step_00000004").glob("*.distcp"))) == 4  # all ranks wrote
    one, four = (json.loads((folder / "results.json").read_text())["results"]["val"] for folder in (alone, sharded))
    assert four == pytest.approx(one, rel=1e-3)  # each on a copy that was gathered from the shards
    assert (sharded / "sheet_val.png").exists()


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"parallel": "ddp"}),
        (2, {"parallel": "ddp", "accum_freq": 2}),
        (2, {"parallel": "fsdp", "accum_freq": 2}),
        (4, {"parallel": "hsdp", "shard_size": 2}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_as_one_process(scenes: Path, tmp_path: Path, alone: Path, ranks: int, options: dict[str, object]) -> None:
    often = {"val_data": f"val={scenes / 'val'}", "eval_frequency": 3} if options == {"parallel": "ddp"} else {}
    assert_same_run(run(scenes, tmp_path, ranks=ranks, **options, **often), alone)


def test_resumed_on_other_ranks_in_another_way(scenes: Path, tmp_path: Path, alone: Path) -> None:
    """Four shards, then two copies, then one process, then two shards, all by the same `--resume auto`.

    A run that was stopped at a step is one whose later checkpoints are lost.
    """
    for stop, ranks, way in [(1, 4, "fsdp"), (2, 2, "ddp"), (3, 1, "ddp"), (4, 2, "fsdp")]:
        folder = run(scenes, tmp_path, ranks=ranks, parallel=way, resume="auto", save_frequency=1)
        for path in checkpoint.stored(folder / "checkpoints"):
            if checkpoint.step_of(path) > stop:
                sharded_checkpoint.remove(path)
    names = [path.name for path in checkpoint.stored(folder / "checkpoints")]
    assert names == ["step_00000002.pt", "step_00000003.pt", "step_00000004"]
    assert_same_run(folder, alone)


def test_frozen_towers_thaw(scenes: Path, tmp_path: Path) -> None:
    """The towers are sharded while they are frozen, and learn afterwards; layer-wise groups come back in order."""
    weights = tmp_path / "weights.pt"
    one = run(scenes, tmp_path / "start", steps=1)
    shutil.copy(one / "checkpoints" / "step_00000001.pt", weights)
    options = {"pretrained": weights, "freeze_steps": 2, "layer_decay": 0.5}
    wanted = run(scenes, tmp_path / "one", **options)
    assert_same_run(run(scenes, tmp_path / "two", ranks=2, parallel="fsdp", **options), wanted)
    thawed = last(wanted)["model"]["visual.blocks.0.mlp.0.weight"]
    assert not torch.equal(thawed, checkpoint.read(weights)["model"]["visual.blocks.0.mlp.0.weight"])


def test_under_autocast_sharding_changes_only_rounding(scenes: Path, tmp_path: Path) -> None:
    ways = {}
    for way in ("ddp", "fsdp"):
        folder = run(scenes, tmp_path / way, ranks=2, parallel=way, precision="amp_bf16", steps=2)
        ways[way] = values(curve(folder))
        assert all(value.dtype == torch.float32 for value in last(folder)["model"].values())
    torch.testing.assert_close(torch.tensor(ways["fsdp"]), torch.tensor(ways["ddp"]), rtol=0.02, atol=0)


def test_others_read_a_sharded_checkpoint(alone: Path, sharded: Path, tmp_path: Path) -> None:
    one, four = cllip_fast.load(alone), cllip_fast.load(sharded)
    texts = ["a red circle", "two blue stars"]
    torch.testing.assert_close(four.encode_text(texts), one.encode_text(texts), rtol=0, atol=1e-4)
    folder = sharded / "checkpoints" / "step_00000004"
    mine, wanted = load_model(folder).state_dict(), last(sharded)["model"]
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert cllip_fast.load(folder).model.config == four.model.config


def test_damage_is_found(sharded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file of a folder is checked; `latest` takes the one before, and says why."""
    for number, name in enumerate(["__2_0.distcp", ".metadata", "state.pt"]):
        folder = tmp_path / str(number)
        shutil.copytree(sharded / "checkpoints", folder)
        newest = folder / "step_00000004"
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
        with pytest.raises(InputError, match=r"step_00000004.* cannot be read"):
            checkpoint.read(newest)
        assert checkpoint.find("latest", folder).name == "step_00000002"
        assert "skips a checkpoint" in caplog.text
    (newest / "__2_0.distcp").unlink()
    assert checkpoint.find("auto", folder).name == "step_00000002"


def test_metadata_cannot_run_code(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000004"
    shutil.copytree(sharded / "checkpoints" / "step_00000004", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Path.cwd))
    state = torch.load(folder / "state.pt")
    state["files"][".metadata"] = sharded_checkpoint.checksum(folder / ".metadata")
    torch.save(state, folder / "state.pt")
    with pytest.raises(InputError, match="no business"):
        checkpoint.read(folder)


def failing_rank(rank: int, world_size: int, flags: list[str]) -> str:
    """Rank 1 cannot write its shards at step 1; the messages of the main rank."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("cllip_fast.train").addHandler(handler)
    write = sharded_checkpoint._FolderWriter.write_data

    def full(self: sharded_checkpoint._FolderWriter, *arguments: object) -> object:
        if rank == 1 and self._final.name == "step_00000001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *arguments)

    sharded_checkpoint._FolderWriter.write_data = full
    run_rank(rank, world_size, flags)
    return "\n".join(messages)


def test_a_failed_save_in_the_background_is_a_warning(scenes: Path, tmp_path: Path) -> None:
    flags = arguments(scenes, tmp_path, parallel="fsdp", batch_size=4, steps=2, save_frequency=1)
    messages = on_ranks(2, failing_rank, flags, timeout=TIMEOUT)
    assert "step_00000001 (--logs-dir, --name) cannot be written by rank 1: No space left on device" in messages[0]
    assert not messages[1]
    names = {path.name for path in (tmp_path / "scenes" / "checkpoints").iterdir()}
    assert names == {"step_00000002"}


def test_what_cannot_be_sharded_is_refused(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--parallel is fsdp, .*the only one"):
        run(scenes, tmp_path, parallel="fsdp")
    with pytest.raises(AssertionError, match="--shard-size is 3, expected a divisor of the 2 ranks"):
        run(scenes, tmp_path, ranks=2, parallel="hsdp", shard_size=3)
