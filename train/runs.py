"""Runs of the trainer by name: trained once, gone on with after a kill, refused where the options are others."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

from cllip_fast.errors import InputError
from cllip_fast.train.checkpoint import stored
from cllip_fast.train.config import Config, parse

MAIN = Path(__file__).with_name("main.py")
# Options that do not change what a run learns.
FREE = {"logs_dir", "name", "resume", "save_frequency", "keep", "log_every_n_steps", "report_to", "device", "workers"}


def results_of(name: str, options: list[str], logs: Path) -> dict[str, object]:
    """The results.json of the run `name`, which is trained first unless it is there, in a process of its own.

    A run that was killed goes on from its newest checkpoint. What the trainer says goes to `logs/<name>.out`. When this
    process is interrupted, the trainer saves a checkpoint and ends too.

    Args:
        name: folder of the run in `logs`.
        options: the trainer's flags.
        logs: folder of the runs.

    Raises:
        InputError: the run was made with other options, is going on in another process, or failed.
    """
    options = [*options, "--logs-dir", str(logs), "--name", name]
    record = finished(logs / name, parse(options))
    if record is not None:
        return record
    resume = ["--resume", "latest"] if stored(logs / name / "checkpoints") else []
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f"{name}.out", "a") as output:
        # The trainer inherits the lock with its output: it is held as long as either lives.
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{logs / name} is being trained by another process") from None
        command = [sys.executable, str(MAIN), *options, *resume]
        # In a session of its own, so that Ctrl-C reaches it as SIGTERM, which saves.
        trainer = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            trainer.wait()
        except BaseException:
            trainer.terminate()
            trainer.wait()
            raise
    record = finished(logs / name, parse(options))
    if record is None:
        raise InputError(f"the run {name} ended without results (exit code {trainer.returncode}); see {output.name}")
    return record


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that the trainer it waits for is ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM; the same command goes on"))


def finished(folder: Path, config: Config) -> dict[str, object] | None:
    """The results.json in `folder`, None where the run has not ended.

    Raises:
        InputError: the run, ended or not, was made with options other than `config`'s.
    """
    started, ended = folder / "config.json", folder / "results.json"
    if started.exists():
        # Options that came later than the run had their defaults in it.
        had, wanted = Config().to_dict() | json.loads(started.read_text()), config.to_dict()
        for name in wanted.keys() - FREE:
            if had[name] != wanted[name]:
                raise InputError(
                    f"{folder} was made with {name} {had[name]!r}, expected {wanted[name]!r}; choose another folder"
                )
    return json.loads(ended.read_text()) if ended.exists() else None
