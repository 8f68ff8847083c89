"""What a run reports: the line, the files, other services by name, the device's use, a trace."""

from __future__ import annotations

import gzip
import json
import math
import resource
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cllip_fast import extras
from cllip_fast.data import Loader, make_scenes
from cllip_fast.errors import InputError
from cllip_fast.plan import Settings
from cllip_fast.plan.layers import model_costs
from cllip_fast.plan.useful import useful_flops
from cllip_fast.train import distributed, evaluation
from cllip_fast.train.config import Config, parse
from cllip_fast.train.logs import RunLog
from cllip_fast.train.reports import JsonLines, create_reports
from cllip_fast.train.speed import Speed, recognise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "scenes", train=16, val=2, unseen=2, processes=1)


def run(scenes: Path, logs: Path, **options: object) -> Path:
    from cllip_fast.train.main import train

    common = {"train_data": scenes / "train", "val_data": f"val={scenes / 'val'}", "logs_dir": logs, "steps": 3,
              "batch_size": 4, "losses": "clip", "log_every_n_steps": 1, "device": "cpu"} | options  # fmt: skip
    arguments = [text for name, value in common.items() for text in ("--" + name.replace("_", "-"), str(value))]
    with distributed.start("cpu") as world:
        assert train(parse(arguments), world)
    return logs / "scenes"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_figure_is_in_the_line_and_in_the_file(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(scenes, tmp_path, losses="clip,patch", log_every_n_steps=2)
    second = lines(folder / "log.jsonl")[0]
    assert second["step"] == 2
    assert second["percent"] == pytest.approx(200 / 3)
    assert {"loss", "contrastive_loss", "patch_loss", "lr", "logit_scale", "region_logit_scale", "grad_norm",
            "skipped", "images_per_s", "ms", "data_wait", "tflops_per_s", "memory_gib",
            "seconds_left"} <= second.keys()  # fmt: skip
    assert 0 <= second["data_wait"] < 1
    assert second["images_per_s"] * second["ms"] == pytest.approx(4000)
    assert second["seconds_left"] == pytest.approx(second["ms"] / 1000)
    assert 0.05 < second["memory_gib"] < 50
    said = capsys.readouterr().out
    (line,) = (each for each in said.splitlines() if each.startswith("step 2/3"))
    for figure in (
        "67%",
        "clip ",
        "patch ",
        "lr ",
        "scale ",
        "grad ",
        "img/s",
        " ms",
        "data ",
        "GFLOP/s",
        "GiB",
        "left",
    ):
        assert figure in line
    assert "GFLOP an image, texts at full length; the device's peak is not known" in said


def create_log(*reports: object, **config: object) -> RunLog:
    return RunLog(reports, Speed(Config(**config), 1, CPU), steps=10, start=0, main=True, device=CPU)


def test_a_skipped_step_is_counted_and_left_out_of_the_means(tmp_path: Path) -> None:
    log = create_log(JsonLines(tmp_path / "log.jsonl", 0))
    scales = {"lr": 0.1, "logit_scale": 1.0, "region_logit_scale": 1.0}
    for interval in ([1.0, math.nan, 3.0], [math.inf]):
        for value in interval:
            bad = torch.tensor(float(not math.isfinite(value)))
            log.add(loss=torch.tensor(value), grad_norm=torch.tensor(2 * value), skipped=bad, data_seconds=0.0)
        log.flush(1, 4, **scales)
    first, second = lines(tmp_path / "log.jsonl")
    assert (first["loss"], first["grad_norm"], first["skipped"]) == (2.0, 4.0, 1)
    assert (second["loss"], second["skipped"]) == (None, 1)  # JSON has no NaN


def test_checkpoints_and_evaluations_are_no_part_of_the_step_time(tmp_path: Path) -> None:
    log = create_log(JsonLines(tmp_path / "log.jsonl", 0))
    log.start_clock()
    with log.paused():
        time.sleep(2)
    log.add(loss=torch.ones(()), grad_norm=torch.ones(()), skipped=torch.zeros(()), data_seconds=0.0)
    log.began -= 1000  # the step
    log.flush(1, 4, lr=0.1, logit_scale=1.0, region_logit_scale=1.0)
    assert 1000 <= lines(tmp_path / "log.jsonl")[0]["ms"] / 1000 < 1002


def test_a_full_disk_costs_no_line_and_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log.jsonl"
    log = create_log(JsonLines(file, 0))
    log.write(1, {"a": 1})
    whole, soft = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, soft[1]))  # room for a part of a line
    try:
        for step in (2, 3):
            log.write(step, {"a": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert file.read_bytes() == whole
    assert capsys.readouterr().out.count("JsonLines cannot be written") == 1
    log.write(4, {"a": 4})
    assert [line["a"] for line in lines(file)] == [1, 2, 3, 4]


def test_a_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "split": "val"}\n{"step": 3}\n{"st')
    JsonLines(file, 2).write(3, {"a": 1})
    assert [line["step"] for line in lines(file)] == [1, 2, 3]
    assert "a" in lines(file)[-1]


# Other services


class FakeRun:
    """The part of `wandb.Run` that is used, with the signatures of wandb 0.31."""

    def __init__(self, **options: object) -> None:
        self.options, self.logged, self.metrics, self.finished = options, [], [], False

    def log(self, data: dict[str, object], step: int | None = None, commit: bool | None = None) -> None:
        self.logged.append((data, step))

    def define_metric(self, name: str, step_metric: str | None = None, step_sync: bool | None = None) -> None:
        self.metrics.append((name, step_metric))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None) -> FakeRun:
        runs.append(FakeRun(project=project, dir=dir, id=id, name=name, config=config, resume=resume))
        return runs[-1]

    module = ModuleType("wandb")
    module.init, module.errors = init, SimpleNamespace(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(extras, "probe", lambda name: "0" if name == "wandb" else None)
    return runs


def test_wandb_gets_every_figure_and_goes_on_in_the_same_run(tmp_path: Path, fake_wandb: list[FakeRun]) -> None:
    config = Config(report_to="wandb", name="mine")
    for start in (0, 5, 0):
        *_, report = create_reports(tmp_path, config, start)
    report.write(7, {"loss": 1.5, "split": "val", "pointing": None})
    report.close()
    first, resumed, fresh = fake_wandb
    assert first.options["id"] == resumed.options["id"] != fresh.options["id"]
    assert (first.options["name"], first.options["resume"], first.options["dir"]) == ("mine", "allow", str(tmp_path))
    assert first.options["config"]["report_to"] == "wandb"
    assert fresh.metrics == [("*", "step")]
    assert fresh.logged == [({"step": 7, "val/loss": 1.5}, None)]
    assert fresh.finished


def test_a_wandb_that_cannot_start_is_one_clear_line(
    tmp_path: Path, fake_wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise sys.modules["wandb"].errors.Error("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(InputError, match="--report-to wandb: no API key; WANDB_MODE=offline"):
        create_reports(tmp_path, Config(report_to="wandb"), 0)


def test_the_real_wandb_offline(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run(scenes, tmp_path, report_to="tensorboard, wandb")
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(folder.glob("tensorboard/events.*"))


def test_reports_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--report-to is 'mlflow', expected one of tensorboard, wandb"):
        Config(report_to="tensorboard,mlflow")
    assert Config(report_to="wandb, tensorboard,wandb").reports == ("wandb", "tensorboard")
    monkeypatch.setattr(extras, "probe", lambda name: None)
    with pytest.raises(InputError, match=r"--report-to wandb needs wandb, .*cllip-fast\[wandb\]"):
        create_reports(tmp_path, Config(report_to="wandb"), 0)


# The device's use


def test_names_of_gpus() -> None:
    known = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
    assert {name: recognise(name).name for name in known} == known
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090", "Tesla V100"):
        assert recognise(other) is None


def test_mfu_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    speed = Speed(Config(model="ViT-B-32", freeze_steps=3, pretrained="x"), 1, torch.device("cuda", 0))
    assert speed.figures(4, 2.0)["mfu"] == pytest.approx(speed.flops / 2 / 989e12)
    assert speed.figures(4, 2.0)["tflops_per_s"] == pytest.approx(speed.flops / 2e12)
    assert speed.figures(3, 2.0)["mfu"] < 0.6 * speed.figures(4, 2.0)["mfu"]  # the towers have no backward yet
    exact = Speed(Config(model="ViT-B-32", precision="fp32"), 1, torch.device("cuda", 0))
    assert exact.figures(1, 1.0)["mfu"] == pytest.approx(speed.flops / 494e12)
    assert "mfu" not in Speed(Config(), 1, CPU).figures(1, 1.0)


def test_useful_work_counts_nothing_twice() -> None:
    run = Settings("ViT-B-32", batch_size=6, gpus=2, losses=("clip",))
    model = sum(cost.forward + cost.backward for cost in model_costs(run).values())
    assert useful_flops(run) == 2 * (model + 3 * 6 * 12 * 512)  # a product forward, two backward
    again = Settings("ViT-B-32", batch_size=3, gpus=2, accum_freq=2, losses=("clip",), grad_checkpointing="blocks")
    assert useful_flops(again) == useful_flops(run)
    local = Settings("ViT-B-32", batch_size=6, losses=("clip", "region", "localization"))
    products = 3 * 512 * (6 * 6 + 24 * 24 + 24 * 49)
    assert useful_flops(local) == 2 * (sum(c.forward + c.backward for c in model_costs(local).values()) + products)


# The trace


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_trace_has_the_named_ranges_of_its_steps(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], accum_freq: int
) -> None:
    batch = {"accum_freq": accum_freq, "batch_size": 4 // accum_freq}
    folder = run(scenes, tmp_path, losses="clip,patch", steps=4, profile="2:2", **batch)
    with gzip.open(folder / "trace_2-3.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    names = [event["name"] for event in events]
    passes = 2 * accum_freq if accum_freq > 1 else 1  # twice through the model, with accumulation
    expected = {"data": 1, "forward": passes, "vision tower": passes, "text tower": 2 * passes, "loss": 1,
                "loss: clip": 1, "loss: patch": 1, "optimizer": 1,
                "backward": 1 + (accum_freq if accum_freq > 1 else 0)}  # fmt: skip
    assert {name: names.count(name) for name in expected} == {name: 2 * count for name, count in expected.items()}
    span = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events}
    assert span["forward"][0] <= span["vision tower"][0] <= span["vision tower"][1] <= span["forward"][1]
    assert "aten::" in (folder / "trace_2-3.txt").read_text()
    said = capsys.readouterr().out
    assert "| optimizer | 2 |" in said
    assert "wrote trace_2-3.json.gz" in said


def test_a_run_that_ends_early_writes_the_steps_it_made(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Config, "profiled", range(2, 30))
    assert (run(scenes, tmp_path) / "trace_2-29.json.gz").exists()


def test_bad_profiles_are_refused(scenes: Path, tmp_path: Path) -> None:
    for bad in ("20", "0:3", "3:0", "a:b", "-1:2"):
        with pytest.raises(InputError, match=r"--profile is .*, expected START:COUNT"):
            Config(profile=bad)
    with pytest.raises(InputError, match="the run ends after step 30"):
        Config(profile="29:3", steps=30)
    assert list(Config(profile="28:3", steps=30).profiled) == [28, 29, 30]
    run(scenes, tmp_path)
    with pytest.raises(InputError, match="--profile starts at step 3, but the run goes on after step 3"):
        run(scenes, tmp_path, resume="latest", steps=4, profile="3:1")


# Evaluation


def test_workers_go_on_while_the_run_evaluates_and_the_curve_is_the_same(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(scenes, tmp_path / "plain", steps=4)
    loaders: list[Loader] = []
    evaluate, forever = evaluation.evaluate, Loader.forever

    def begun(self: Loader) -> object:
        loaders.append(self)
        return forever(self)

    def waiting(*args: object, **kwargs: object) -> dict:
        queue, deadline = loaders[0]._batches._iterator._worker_result_queue, time.monotonic() + 60
        while queue.empty() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not queue.empty(), "no batch was prepared during the evaluation"
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(Loader, "forever", begun)
    monkeypatch.setattr(evaluation, "evaluate", waiting)
    evaluated = run(scenes, tmp_path / "evaluated", steps=4, eval_frequency=2, workers=1)
    assert len(loaders) == 1

    def losses(folder: Path) -> list[float]:
        return [line["loss"] for line in lines(folder / "log.jsonl") if "loss" in line]

    assert losses(evaluated) == losses(plain)
    assert [line["step"] for line in lines(evaluated / "log.jsonl") if "split" in line] == [2, 4]
