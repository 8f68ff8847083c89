"""Where a run's figures go: a JSONL file always, TensorBoard and Weights & Biases by name."""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Protocol

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.train.checkpoint import writable
from cllip_fast.train.config import Config

Figures = dict[str, object]


class Report(Protocol):
    """Takes the figures of a step; those of an evaluation name its `split`. May raise `OSError`."""

    def write(self, step: int, figures: Figures) -> None: ...

    def close(self) -> None: ...


def create_reports(folder: Path, config: Config, start: int) -> list[Report]:
    """All reports of the run in `folder`, which goes on after step `start`: log.jsonl and those of `--report-to`.

    Raises:
        InputError: a package is absent or cannot be started, or the folder cannot be written.
    """
    for name in config.reports:
        extras.require(name, f"--report-to {name}")
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        makers = {"tensorboard": TensorBoard, "wandb": Wandb}
        asked = [makers[name](folder, config, start) for name in config.reports]
        return [JsonLines(folder / "log.jsonl", start), *asked]


class JsonLines:
    """A file of one JSON object a line. What a full disk refuses is kept, and written once there is room again.

    Lines of steps after `start`, which are about to be repeated, are dropped first: a resumed log reads like an
    unbroken one. Numbers that JSON does not have (NaN, infinities) become null.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._pending: list[bytes] = []
        if not path.exists():
            return
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= start))
        os.replace(aside, path)

    def write(self, step: int, figures: Figures) -> None:
        record = {"step": step} | {name: _finite(value) for name, value in figures.items()}
        self._pending.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            lines = b"".join(self._pending)
            try:
                if file.write(lines) < len(lines):  # a disk that fills up takes a part first
                    raise OSError("no room for a whole line")
            except OSError:
                file.truncate(end)
                raise
        self._pending.clear()

    def close(self) -> None:
        pass


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_name(figures: Figures) -> dict[str, float]:
    """The numbers among the figures, as `train/loss` or `val/pointing`."""
    prefix = figures.get("split", "train")
    return {f"{prefix}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path, config: Config, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, step: int, figures: Figures) -> None:
        for name, value in _by_name(figures).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, files in `folder/wandb`; WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are theirs.

    A resumed run goes on in the same one. Steps are a figure of their own (`step`), since theirs may never go back.
    """

    def __init__(self, folder: Path, config: Config, start: int) -> None:
        import wandb

        id_file = folder / "wandb_id"
        if start == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "cllip-fast"),
                name=config.name,
                id=id_file.read_text(),
                resume="allow",
                dir=str(folder),
                config=config.to_dict(),
            )
        except wandb.errors.Error as error:
            raise InputError(f"--report-to wandb: {error}; WANDB_MODE=offline needs no account") from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Figures) -> None:
        self._run.log({"step": step} | _by_name(figures))

    def close(self) -> None:
        self._run.finish()
