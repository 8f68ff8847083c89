"""Runs by name: finished ones are read, killed ones gone on with, others' options refused."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cllip_fast.errors import InputError
from cllip_fast.train import runs
from cllip_fast.train.config import Config
from cllip_fast.train.runs import results_of


def stand_in(folder: Path, **options: object) -> Path:
    """A run that has ended, made without training."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(Config(name=folder.name, **options).to_dict()))
    (folder / "results.json").write_text('{"step": 7}')
    return folder


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    stand_in(tmp_path / "a", steps=7, save_frequency=3)
    assert results_of("a", ["--steps", "7", "--save-frequency", "200"], tmp_path) == {"step": 7}


def test_a_run_made_with_other_options_is_refused(tmp_path: Path) -> None:
    folder = stand_in(tmp_path / "a", steps=7)
    with pytest.raises(InputError, match="was made with steps 7, expected 8"):
        results_of("a", ["--steps", "8"], tmp_path)
    (folder / "results.json").unlink()  # one that has not ended too
    with pytest.raises(InputError, match="was made with losses 'all', expected 'clip'"):
        results_of("a", ["--steps", "7", "--losses", "clip"], tmp_path)


def test_a_run_of_a_time_before_an_option_had_its_default(tmp_path: Path) -> None:
    folder = stand_in(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    del config["layer_decay"]
    (folder / "config.json").write_text(json.dumps(config))
    assert results_of("a", [], tmp_path) == {"step": 7}
    with pytest.raises(InputError, match=r"layer_decay 1\.0, expected 0\.5"):
        results_of("a", ["--layer-decay", "0.5"], tmp_path)


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "a.out", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being trained by another process"):
            results_of("a", [], tmp_path)


def test_a_run_that_fails_names_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tmp_path / "trainer.py"
    trainer.write_text("raise SystemExit('no such shards')")
    monkeypatch.setattr(runs, "MAIN", trainer)
    with pytest.raises(InputError, match=r"the run a ended without results \(exit code 1\); see .*a\.out"):
        results_of("a", [], tmp_path)
    assert "no such shards" in (tmp_path / "a.out").read_text()


def test_what_is_stopped_stops_its_trainer(tmp_path: Path) -> None:
    trainer, started, saved = tmp_path / "trainer.py", tmp_path / "started", tmp_path / "saved"
    trainer.write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({str(saved)!r}).touch()))\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    code = f"""
import pathlib
from cllip_fast.train import runs
runs.exit_on_sigterm()
runs.MAIN = pathlib.Path({str(trainer)!r})
runs.results_of("a", [], pathlib.Path({str(tmp_path)!r}))
"""
    caller = subprocess.Popen([sys.executable, "-c", code])
    while not started.exists():
        assert caller.poll() is None
        time.sleep(0.05)
    caller.terminate()
    assert caller.wait(timeout=60) == 1
    assert saved.exists()


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step_00000004.pt").touch()
    seen = tmp_path / "seen.json"
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        f"import json, pathlib, sys; pathlib.Path({str(seen)!r}).write_text(json.dumps(sys.argv[1:]));"
        f"pathlib.Path({str(tmp_path / 'a' / 'results.json')!r}).write_text('{{}}')"
    )
    monkeypatch.setattr(runs, "MAIN", trainer)
    assert results_of("a", ["--steps", "8"], tmp_path) == {}
    assert json.loads(seen.read_text())[-2:] == ["--resume", "latest"]
