"""Checkpoints: written aside, synced and renamed, so that whenever a process is killed the last one is whole.

A checkpoint is what `torch.save` writes: a ZIP archive in which every record carries its CRC-32. PyTorch does not check
these when it loads; `read` does, so a flipped bit is found and no second file can go missing. A model that is sharded
over ranks is written by all of them into a folder instead (`sharded_checkpoint`); either kind is read everywhere.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cllip_fast.data import Loader
from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel, ModelConfig
from cllip_fast.train import parallel, sharded_checkpoint
from cllip_fast.train.config import Config
from cllip_fast.train.sharded_checkpoint import sync_folder

FORMAT = 2

_log = logging.getLogger("cllip_fast.train")


@dataclass
class Checkpoints:
    """The checkpoints of one run: model, optimizer, position in the data, random states and the options.

    All ranks make and call it; of a model that each has whole, only the main one writes.
    """

    folder: Path
    config: Config
    model: CllipModel
    optimizer: torch.optim.Optimizer
    loader: Loader
    main: bool = True
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, enabled=False))
    _writer: sharded_checkpoint.Writer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if parallel.is_sharded(self.model):
            self._writer = sharded_checkpoint.Writer()

    def prepare(self) -> None:
        """Make the folder, remove what killed runs left half-written, and prove that a checkpoint can be written.

        Raises:
            InputError: the folder cannot be made or written, or has no room for one checkpoint.
        """
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in list(self.folder.glob("step_*.tmp")):
                sharded_checkpoint.remove(left_over)
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

    def save(self, step: int, *, wait: bool = False) -> Path:
        """Write `folder/step_<step>.pt`, or a folder without the suffix; nothing half-written ever has such a name.

        A folder is written in the background while the run goes on; one at a time, so that a save waits for the one
        before. With `wait` it is there on return.

        Raises:
            InputError: the disk is full or the folder not writable; the earlier checkpoints are as they were.
        """
        path = self.folder / f"step_{step:08d}"
        if self._writer is not None:
            self._finish_earlier()
            self._writer.start(path, self._state(step), lambda: self._prune(step))
            if wait:
                self._writer.finish()
            return path
        path = path.with_suffix(".pt")
        if not self.main:
            return path
        with writable(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside(path.with_suffix(".tmp")) as file:
                torch.save(self._state(step), file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            sync_folder(self.folder)  # the new name is on disk before an old one goes
            self._prune(step)
        return path

    def poll(self) -> None:
        """Warn of a save in the background that has failed; to be called after each step."""
        if self._writer is not None and not self._writer.running():
            self._finish_earlier()

    def _finish_earlier(self) -> None:
        try:
            self._writer.finish()
        except InputError as error:
            if self.main:
                _log.warning("%s; the run goes on", error)

    def _state(self, step: int) -> dict[str, object]:
        return {
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

    def _prune(self, step: int) -> None:
        """Keep the newest up to this step: later ones, left by what the run was resumed from, must not crowd it out."""
        until_now = [each for each in stored(self.folder) if step_of(each) <= step]
        for old in until_now[: -self.config.keep] if self.config.keep else []:
            sharded_checkpoint.remove(old)

    def restore(self, path: Path) -> int:
        """Load `path` into model, optimizer, loader and random number generators; return its step.

        Raises:
            InputError: the checkpoint is missing, damaged, or of another model, set of losses or optimizer.
        """
        # On a GPU everything is copied from the map, which the ranks of a machine share. On a CPU the optimizer would
        # keep the mapped tensors, and with them the file on disk, however long ago it was deleted.
        on_gpu = next(self.model.parameters()).device.type != "cpu"
        parameters = dict(self.model.named_parameters())
        in_order = [each for group in self.optimizer.param_groups for each in group["params"]]

        def parameter_at(keys: sharded_checkpoint.Keys) -> torch.Tensor | None:
            return parameters.get(keys[1]) if keys[0] == "model" else in_order[keys[2]]

        sharded = parallel.is_sharded(self.model)
        state = read(path, mmap=on_gpu, like=parameter_at if sharded else None)
        saved_model = ModelConfig.from_dict(state["model_config"])  # fills in what it did not know of
        check_same(path, "model", saved_model.to_dict(), self.model.config.to_dict())
        # What would make the rest of the run another experiment, or the optimizer's groups others.
        fixed = ("losses", "seed", "train_data", "weights", "resampled", "layer_decay", "freeze_steps", "opt")
        mine, saved = self.config.to_dict(), Config().to_dict() | state["config"]
        check_same(path, "run", {k: saved.get(k) for k in fixed}, {k: mine[k] for k in fixed})
        if sharded:
            for name, value in state["model"].items():
                state["model"][name] = parallel.shard_like(value, parameters.get(name, value))
            for index, values in state["optimizer"]["state"].items():
                state["optimizer"]["state"][index] = {
                    name: parallel.shard_like(value, in_order[index]) for name, value in values.items()
                }
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
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+(\.pt)?", path.name)]
    return sorted((path for path in found if path.suffix or sharded_checkpoint.is_folder(path)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def set_aside(run: Path) -> Path | None:
    """Rename the folder of an earlier run of the same name, so that its checkpoints are never taken for this one's."""
    if not stored(run / "checkpoints"):
        return None
    free = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.{n}").exists())
    with writable(run):
        return run.rename(run.with_name(f"{run.name}.{free}"))


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a path, the newest undamaged one of `folder` ('latest'), or '' for none.

    'auto' is 'latest' where the run has checkpoints, and none where it has yet to begin.

    Raises:
        InputError: 'latest', and there is none, or 'auto', and all are damaged; those were logged as warnings.
    """
    if resume not in ("latest", "auto"):
        return Path(resume) if resume else None
    found = stored(folder)
    if not found and resume == "auto":
        return None
    for path in reversed(found):
        try:
            verify(path)
        except InputError as error:
            _log.warning("--resume %s skips a checkpoint: %s", resume, error)
        else:
            return path
    damaged = f"; {len(found)} cannot be used" if found else ""
    raise InputError(f"--resume {resume} finds no checkpoint in {folder}{damaged}")


def verify(path: Path) -> None:
    """Check all checksums of a checkpoint. Raises as `read`."""
    state = _read_file(path / sharded_checkpoint.STATE if path.is_dir() else path, mmap=True)
    if path.is_dir():
        sharded_checkpoint.check(path, state["files"])


def read(
    path: str | Path,
    *,
    mmap: bool = False,
    like: Callable[[sharded_checkpoint.Keys], torch.Tensor | None] | None = None,
) -> dict[str, object]:
    """Read a checkpoint onto the CPU, after checking its checksums.

    Args:
        path: a file, or the folder of a sharded one, whose tensors come whole.
        mmap: leave the tensors of a file in it.
        like: a sharded one's tensors come sharded as the parameters that this gives (see `read_tensors`), each rank
            reading its part; then it is `verify`, on one rank, that checks all files.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this trainer.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path, mmap=mmap)
    state = _read_file(path / sharded_checkpoint.STATE, mmap=False)
    if like is None:
        sharded_checkpoint.check(path, state["files"])
    try:
        return sharded_checkpoint.read_tensors(path, state, like or (lambda keys: None))
    except Exception as error:  # as below
        raise InputError(f"checkpoint {path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def _read_file(path: Path, *, mmap: bool) -> dict[str, object]:
    if not path.is_file():
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
