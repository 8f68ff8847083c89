"""Whole runs of the trainer on a few generated scenes: logs, resume, ranks, signals, faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError
from cllip_fast.train import checkpoint, distributed
from cllip_fast.train.config import parse
from cllip_fast.train.main import train
from cllip_fast.train.signals import UNFINISHED
from tests.launched import kill, launch, output_of, wait_for_lines

MAIN = Path(__file__).parents[2] / "train" / "main.py"
SCENES = 96


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    return make_scenes(root, train=SCENES, val=20, unseen=20, processes=1)


def arguments(scenes: Path, logs: Path, **options: object) -> list[str]:
    common = {
        "train_data": scenes / "train",
        "val_data": f"val={scenes / 'val'}",
        "logs_dir": logs,
        "steps": 8,
        "batch_size": 8,
        "warmup": 2,
        "log_every_n_steps": 1,
        "save_frequency": 4,
        "device": "cpu",
    } | options
    return [text for name, value in common.items() for text in ("--" + name.replace("_", "-"), str(value))]


def run(scenes: Path, logs: Path, **options: object) -> Path:
    config = parse(arguments(scenes, logs, **options))
    with distributed.start("cpu") as world:
        train(config, world)
    return logs / config.name


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def whole_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(scenes, tmp_path_factory.mktemp("whole"))


def test_a_run_writes_what_it_promises(whole_run: Path) -> None:
    for name in (
        "config.json",
        "log.jsonl",
        "results.json",
        "sheet_val.png",
        "curves.png",
        "checkpoints/step_00000008.pt",
    ):
        assert (whole_run / name).stat().st_size > 0, name
    results = json.loads((whole_run / "results.json").read_text())
    assert results["step"] == 8
    assert set(results["results"]) == {"val"}
    assert sorted(losses(whole_run)) == list(range(1, 9))


def test_parts_sum_to_the_loss_and_all_are_there(whole_run: Path) -> None:
    first = json.loads((whole_run / "log.jsonl").read_text().splitlines()[0])
    parts = {name: value for name, value in first.items() if name.endswith("_loss")}
    assert set(parts) == {f"{p}_loss" for p in ("contrastive", "region", "grounding", "patch", "localization")}
    assert sum(parts.values()) == pytest.approx(first["loss"], rel=1e-5)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(scenes: Path, tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(whole_run, folder)
    (folder / "checkpoints" / "step_00000008.pt").unlink()
    (folder / "checkpoints" / "step_00000012.tmp").write_bytes(b"killed while writing")
    run(scenes, tmp_path, resume="latest")
    assert losses(folder) == losses(whole_run)
    before = checkpoint.read(whole_run / "checkpoints" / "step_00000008.pt")["model"]
    after = checkpoint.read(folder / "checkpoints" / "step_00000008.pt")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_processes_follow_the_curve_of_one(scenes: Path, tmp_path: Path, whole_run: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(MAIN)]
    process = launch(command + arguments(scenes, tmp_path, batch_size=4), env=os.environ | {"OMP_NUM_THREADS": "1"})
    output = output_of(process)
    assert process.returncode == 0, output
    one, two = losses(whole_run), losses(tmp_path / "scenes")
    assert two.keys() == one.keys()
    assert [two[step] for step in sorted(one)] == pytest.approx([one[step] for step in sorted(one)], rel=2e-4)


def test_sigterm_saves_and_ends_with_its_exit_code(scenes: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(MAIN), *arguments(scenes, tmp_path, steps=4000, save_frequency=100_000)]
    process = launch(command)
    folder = tmp_path / "scenes"
    wait_for_lines(folder / "log.jsonl", 3, process)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert process.returncode == UNFINISHED == 75, output
    assert "stopped by SIGTERM" in output
    assert not (folder / "results.json").exists()
    saved = checkpoint.find("latest", folder / "checkpoints")
    step = int(saved.stem[5:])
    assert step == max(losses(folder))
    assert checkpoint.read(saved)["step"] == step


def test_sigkill_loses_only_the_work_since_the_last_checkpoint(scenes: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(MAIN), *arguments(scenes, tmp_path, steps=4000, save_frequency=2)]
    process = launch(command)
    folder = tmp_path / "scenes"
    wait_for_lines(folder / "log.jsonl", 7, process)
    kill(process)
    step = checkpoint.read(checkpoint.find("latest", folder / "checkpoints"))["step"]
    assert step >= 6
    with distributed.start("cpu") as world:  # one step more than was saved: the schedule's length is free to change
        train(parse(arguments(scenes, tmp_path, steps=step + 1, resume="latest", val_data="")), world)
    assert sorted(losses(folder)) == list(range(1, step + 2))


def test_a_new_run_of_the_same_name_sets_the_earlier_one_aside(scenes: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run(scenes, tmp_path, steps=4, save_frequency=1, keep=2, val_data="")
    for folder in ("scenes.1", "scenes"):
        names = [path.name for path in checkpoint.stored(tmp_path / folder / "checkpoints")]
        assert names == ["step_00000003.pt", "step_00000004.pt"]
        assert sorted(losses(tmp_path / folder)) == [1, 2, 3, 4]


def test_a_broken_image_is_counted_and_training_goes_on(scenes: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    shard = sorted((broken / "train").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    start = data.find(b"\xff\xd8\xff")
    data[start : start + 300] = bytes(300)
    shard.write_bytes(data)
    folder = run(broken, tmp_path, steps=SCENES // 8, val_data="")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["samples_skipped"] >= 1
    assert lines[-1]["samples_seen"] + lines[-1]["samples_skipped"] == lines[-1]["samples_total"]


def test_clip_alone_trains_and_is_evaluated_on_regions(scenes: Path, tmp_path: Path) -> None:
    folder = run(scenes, tmp_path, losses="clip", region="roi_align", steps=2, report_to="tensorboard")
    assert list((folder / "tensorboard").glob("events.*"))
    results = json.loads((folder / "results.json").read_text())["results"]["val"]
    assert results["recognition_top1"] is not None
    assert results["grounding_acc50"] is None


def test_gradients_that_are_not_finite_stop_the_run(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllip_fast.train import main as trainer

    forward = trainer.forward

    def broken(*arguments: object) -> dict:
        output = forward(*arguments)
        return output | {"image_features": output["image_features"] * float("nan")}

    monkeypatch.setattr(trainer, "forward", broken)
    with pytest.raises(InputError, match=r"3 steps in a row, up to step 3, .*skipped\.jsonl"):
        run(scenes, tmp_path, max_skipped=3)
    assert not list((tmp_path / "scenes" / "checkpoints").glob("*.pt"))
    first, *_ = (json.loads(line) for line in (tmp_path / "scenes" / "skipped.jsonl").read_text().splitlines())
    assert first["losses"]["contrastive_loss"] == "nan"
    assert float(first["losses"]["region_loss"]) > 0
    assert len(first["keys"][0]) == 8


def test_bad_input_is_refused_by_name(scenes: Path, tmp_path: Path, whole_run: Path) -> None:
    saved = whole_run / "checkpoints" / "step_00000008.pt"
    cases = {
        "--model is 'tyni'": {"model": "tyni"},
        "absent": {"train_data": tmp_path / "absent"},
        "--val-data": {"val_data": "val"},
        "--resume latest finds no checkpoint": {"resume": "latest"},
        "does not exist": {"resume": tmp_path / "absent.pt"},
        "of another model: .*region": {"resume": saved, "region": "roi_align"},
        "of another run: losses": {"resume": saved, "losses": "clip,region,grounding,patch"},
        "xformers": {"attention": "xformers"},
    }
    for message, options in cases.items():
        with pytest.raises(InputError, match=message):
            run(scenes, tmp_path, **options)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        run(scenes, tmp_path, resume=damaged)


def test_the_command_line_ends_with_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, str(MAIN), "--train-data", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
