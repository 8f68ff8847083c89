"""Checkpoints: written aside and renamed, so that a killed process leaves the last one whole; read `weights_only`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from cllip_fast.data import Loader
from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel
from cllip_fast.train.config import Config

FORMAT = 1


@dataclass
class Checkpoints:
    """The checkpoints of one run: model, optimizer, position in the data, random state and the options."""

    folder: Path
    config: Config
    model: CllipModel
    optimizer: torch.optim.Optimizer
    loader: Loader

    def save(self, step: int) -> Path:
        """Write `folder/step_<step>.pt`; at no moment is there a half-written file of that name."""
        state = {
            "format": FORMAT,
            "step": step,
            "config": self.config.to_dict(),
            "model_config": self.model.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "random": torch.get_rng_state(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.pt"
        aside = path.with_suffix(".tmp")
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        for old in stored(self.folder)[: -self.config.keep] if self.config.keep else []:
            old.unlink()
        return path

    def restore(self, path: Path) -> int:
        """Load `path` into model, optimizer and loader; return its step.

        Raises:
            InputError: the checkpoint is missing, damaged, or of another model, set of losses or optimizer.
        """
        state = read(path)
        check_same(path, "model", state["model_config"], self.model.config.to_dict())
        fixed = ("losses", "seed", "train_data")  # what would make the rest of the run another experiment
        mine, saved = self.config.to_dict(), state["config"]
        check_same(path, "run", {k: saved.get(k) for k in fixed}, {k: mine[k] for k in fixed})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["random"])
        return state["step"]


def stored(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest step first."""
    return sorted(path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name))


def set_aside(run: Path) -> Path | None:
    """Rename the folder of an earlier run of the same name, so that its checkpoints are never taken for this one's."""
    if not stored(run / "checkpoints"):
        return None
    free = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.{n}").exists())
    return run.rename(run.with_name(f"{run.name}.{free}"))


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a path, 'latest' of `folder`, or '' for none."""
    if resume != "latest":
        return Path(resume) if resume else None
    found = stored(folder)
    if not found:
        raise InputError(f"--resume latest finds no checkpoint in {folder}")
    return found[-1]


def read(path: str | Path) -> dict[str, object]:
    """Read a checkpoint onto the CPU.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this trainer.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise InputError(f"checkpoint {path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this trainer (format {FORMAT})")
    return state


def check_same(path: str | Path, what: str, saved: dict[str, object], current: dict[str, object]) -> None:
    """Raise `InputError` that names each entry in which the checkpoint's `what` differs from the current one."""
    differing = [
        f"{key} is {saved.get(key)!r} there, {current.get(key)!r} here"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise InputError(f"checkpoint {path} is of another {what}: {'; '.join(differing)}")
