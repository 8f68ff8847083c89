"""The training step's benchmark: both trainers do the same work, and its report is what was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks import test_train_step as benchmark
from benchmarks.step_report import build, markdown
from cllip_fast.interchange import load_pretrained
from cllip_fast.models import create_model

SMALL = {"image_size": 32, "vision_depth": 1, "text_depth": 1, "vocab_size": 64}


def test_three_steps_of_both_trainers_give_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    monkeypatch.setattr(benchmark, "create_model", lambda name, **options: create_model(name, **options, **SMALL))
    batch = benchmark.make_batch(32, 4, 64)
    ours = benchmark.our_step("ViT-Ti-16", ("clip",), batch)
    theirs = benchmark.openclip_step(ours.model, batch)
    assert benchmark.work(ours) == benchmark.work(theirs)
    torch.save(theirs.model.state_dict(), tmp_path / "weights.pt")
    load_pretrained(ours.model, str(tmp_path / "weights.pt"))
    for step in (ours, theirs):
        step.seconds.clear()
    for _ in range(3):
        torch.testing.assert_close(ours(), theirs(), rtol=2e-3, atol=1e-4)
    assert set(ours.shares()) == {"vision tower", "text tower", "prompter, heads", "losses", "backward", "optimizer"}
    assert all(milliseconds > 0 for milliseconds in ours.shares().values())
    assert set(theirs.shares()) == set(ours.shares())


def test_report_worked_by_hand() -> None:
    def step(losses: list[str], median: float) -> dict:
        info = {
            "train_step": {"model": "ViT-B-32", "losses": losses, "batch": 16, "image_size": 224, "text": 77},
            "parts": {"data": 50.0, "vision tower": 300.0, "backward": 100.0},
            "peer": {"median": 0.8, "min": 0.7, "rounds": 5, "parts": {"vision tower": 200.0, "backward": 600.0}},
        }
        return {"extra_info": info, "stats": {"median": median, "min": median / 2, "rounds": 5}}

    environment = {"command": "pytest", "cpu": "C", "cores": 2, "threads": 2, "torch": "2", "load": 0.5}
    report = build(
        {
            "datetime": "2026-01-02T03:04:05",
            "commit_info": {"id": "0123456789abcdef", "dirty": False},
            "machine_info": {"cllip_fast": environment},
            "benchmarks": [
                {"extra_info": {"loss": "clip"}, "stats": {}},
                step(["clip"], 0.4),
                step(["clip", "patch"], 1.6),
            ],
        }
    )
    plain, every = report["steps"]
    assert (plain["losses"], plain["time_ratio"], plain["met"]) == ("clip", pytest.approx(2.0), True)
    assert (every["losses"], every["time_ratio"], every["met"]) == ("all", pytest.approx(0.5), None)
    text = markdown(report)
    assert (
        "| ViT-B-32 | clip | 16 × 224 px, 77 tokens | 400.0 (200.0) | 800.0 (700.0) | 2.00 | time_ratio ≥ 1: met |"
        in text
    )
    assert "| ViT-B-32 | clip | 50.0 (12%) | 300.0 (75%) | – | – | – | 100.0 (25%) | – |" in text
    assert text.count("| ViT-B-32 | OpenCLIP |") == 1
