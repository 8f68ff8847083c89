"""Checkpoints: written aside, synced and renamed, so that whenever a process is killed the last one is whole.

A checkpoint is what `torch.save` writes: a ZIP archive in which every record carries its CRC-32. PyTorch does not check
these when it loads; `read` does, so a flipped bit is found and no second file can go missing.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cllip_fast.data import Loader
from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel, ModelConfig
from cllip_fast.train.config import Config

FORMAT = 2

_log = logging.getLogger("cllip_fast.train")


@dataclass
class Checkpoints:
    """The checkpoints of one run: model, optimizer, position in the data, random states and the options."""

    folder: Path
    config: Config
    model: CllipModel
    optimizer: torch.optim.Optimizer
    loader: Loader
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, enabled=False))

    def prepare(self) -> None:
        """Make the folder, remove what killed runs left half-written, and prove that a checkpoint can be written.

        Raises:
            InputError: the folder cannot be made or written, or has no room for one checkpoint.
        """
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("step_*.tmp"):
                left_over.unlink()
            probe = self.folder / "step_probe.tmp"
            with aside(probe) as file:
                file.write(b"probe")
            free = shutil.disk_usage(self.folder).free
        need = self.size()
        if free < need:
            raise InputError(f"{self.folder} has {free / 1e9:.2f} GB free, a checkpoint needs {need / 1e9:.2f} GB")

    def size(self) -> int:
        """Bytes of a checkpoint, nearly: the model's state and AdamW's two moments of what is trained."""
        trained = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        tensors = [*self.model.state_dict().values()] + 2 * [p for p in trained if p.requires_grad]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def save(self, step: int) -> Path:
        """Write `folder/step_<step>.pt`; at no moment is there a half-written file of that name.

        Raises:
            InputError: the disk is full or the folder not writable; the earlier checkpoints are as they were.
        """
        state = {
            "format": FORMAT,
            "step": step,
            "config": self.config.to_dict(),
            "model_config": self.model.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "random": random_state(),
            "scaler": self.scaler.state_dict(),  # empty unless --precision amp_fp16
        }
        path = self.folder / f"step_{step:08d}.pt"
        with writable(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside(path.with_suffix(".tmp")) as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            sync_folder(self.folder)  # the new name is on disk before an old one goes
            # Later steps than this one, left by what the run was resumed from, must not crowd it out.
            until_now = [each for each in stored(self.folder) if each.name <= path.name]
            for old in until_now[: -self.config.keep] if self.config.keep else []:
                old.unlink(missing_ok=True)
        return path

    def restore(self, path: Path) -> int:
        """Load `path` into model, optimizer, loader and random number generators; return its step.

        Raises:
            InputError: the checkpoint is missing, damaged, or of another model, set of losses or optimizer.
        """
        # On a GPU everything is copied from the map, which the ranks of a machine share. On a CPU the optimizer would
        # keep the mapped tensors, and with them the file on disk, however long ago it was deleted.
        on_gpu = next(self.model.parameters()).device.type != "cpu"
        state = read(path, mmap=on_gpu)
        saved_model = ModelConfig.from_dict(state["model_config"])  # fills in what it did not know of
        check_same(path, "model", saved_model.to_dict(), self.model.config.to_dict())
        # What would make the rest of the run another experiment, or the optimizer's groups others.
        fixed = ("losses", "seed", "train_data", "weights", "resampled", "layer_decay", "freeze_steps", "opt")
        mine, saved = self.config.to_dict(), Config().to_dict() | state["config"]
        check_same(path, "run", {k: saved.get(k) for k in fixed}, {k: mine[k] for k in fixed})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        set_random_state(state["random"])
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's errors (disk full, read-only, no permission, ...) into an `InputError` that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # PyTorch's writer raises its own over the system's
            cause = cause.__context__
        if cause is None:
            raise
        raise InputError(f"{path} (--logs-dir, --name) cannot be written: {cause.strerror or cause}") from error


@contextmanager
def aside(path: Path) -> Iterator:
    """A new file open for writing bytes that is gone afterwards, unless it was renamed."""
    try:
        with open(path, "wb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk: after a rename, so that a power cut does not undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_state() -> dict[str, object]:
    """The states of Python's, NumPy's and PyTorch's generators, as plain values and tensors.

    All ranks start from one seed, so the main rank's states are every rank's. CUDA: this process's current device.
    """
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, object]) -> None:
    """Undo all draws since `random_state`; a checkpoint made without a GPU leaves the GPU's generator alone."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def stored(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest step first; `read` says whether one is undamaged."""
    return sorted(path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name))


def set_aside(run: Path) -> Path | None:
    """Rename the folder of an earlier run of the same name, so that its checkpoints are never taken for this one's."""
    if not stored(run / "checkpoints"):
        return None
    free = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.{n}").exists())
    with writable(run):
        return run.rename(run.with_name(f"{run.name}.{free}"))


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a path, the newest undamaged one of `folder` ('latest'), or '' for none.

    Raises:
        InputError: 'latest', and there is none; the damaged ones were logged as warnings.
    """
    if resume != "latest":
        return Path(resume) if resume else None
    found = stored(folder)
    for path in reversed(found):
        try:
            read(path, mmap=True)
        except InputError as error:
            _log.warning("--resume latest skips a checkpoint: %s", error)
        else:
            return path
    damaged = f"; {len(found)} cannot be used" if found else ""
    raise InputError(f"--resume latest finds no checkpoint in {folder}{damaged}")


def read(path: str | Path, *, mmap: bool = False) -> dict[str, object]:
    """Read a checkpoint onto the CPU, after checking all its checksums; with `mmap` its tensors stay in the file.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this trainer.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of its record {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # zipfile and torch raise a dozen types for a damaged file
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
