"""A checkpoint as a folder that all ranks write at once, in the background (`torch.distributed.checkpoint`).

    step_00001000.tmp/ -> step_00001000/    renamed when it is complete, so that what has the name is whole
        __0_0.distcp, __1_0.distcp, ...     tensors of the model and the optimizer, each rank its shards
        .metadata                           which of them lie where
        state.pt                            everything else that a one-file checkpoint has, and the CRC-32 of each file

A rank stands still while its shards are copied to the host's memory. They can be read on any number of ranks, sharded
or whole: each reads the parts it needs.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from cllip_fast.errors import InputError

STATE = "state.pt"
_BLOCK = 2**24  # bytes read at a time

State = dict[str, object]
Keys = tuple[str | int, ...]  # where a tensor lies in the state: ("optimizer", "state", 3, "exp_avg")


class Writer:
    """Writes one checkpoint at a time; all ranks make one, and call it, together."""

    def __init__(self) -> None:
        # Connections of its own: the background's collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo")
        gpu = torch.cuda.is_available()
        options = StagingOptions(gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu)
        self._stager = DefaultStager(options)  # keeps its memory, pinned for a GPU's sake, from save to save
        self._future: Future | None = None
        self._path = Path()

    def start(self, path: Path, state: State, published: Callable[[], None]) -> None:
        """Copy the shards and begin to write them to `path`; `published` is called on the main rank when it is there.

        The one before must have been finished.
        """
        aside, self._path = path.with_suffix(".tmp"), path
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        tensors = dict(_tensors(state))
        others = {
            index: {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            for index, values in state["optimizer"]["state"].items()
        }
        rest = state | {
            "model": {},
            "optimizer": state["optimizer"] | {"state": others},
            "tensors": {_join(keys): keys for keys in tensors},
        }
        self._future = dcp.async_save(
            {_join(keys): tensor for keys, tensor in tensors.items()},
            storage_writer=_FolderWriter(aside, path, rest, published),
            process_group=self._group,
            async_stager=self._stager,
        )

    def running(self) -> bool:
        return self._future is not None and not self._future.done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            InputError: a rank could not write; the same on each rank. What was written is removed.
        """
        future, self._future = self._future, None
        if future is None:
            return
        try:
            future.result()
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if dist.get_rank() == 0:
                shutil.rmtree(self._path.with_suffix(".tmp"), ignore_errors=True)
            reason = cause.strerror if isinstance(cause, OSError) else f"{type(cause).__name__}: {str(cause)[:200]}"
            message = f"{self._path} (--logs-dir, --name) cannot be written by rank {rank}: {reason}"
            raise InputError(message) from error


class _FolderWriter(dcp.FileSystemWriter):
    """Adds `state.pt` when all ranks have written, and names the folder: in the background of the main rank."""

    def __init__(self, aside: Path, path: Path, rest: State, published: Callable[[], None]) -> None:
        super().__init__(aside, sync_files=True)
        self._aside, self._final, self._rest, self._published = aside, path, rest, published

    def finish(self, metadata: Metadata, results: list[list]) -> None:
        super().finish(metadata, results)
        sums = {file.name: checksum(file) for file in sorted(self._aside.iterdir())}
        with open(self._aside / STATE, "wb") as file:
            torch.save(self._rest | {"files": sums}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._aside)
        remove(self._final)  # a damaged one that was skipped
        os.replace(self._aside, self._final)
        sync_folder(self._final.parent)
        self._published()


class _FolderReader(dcp.FileSystemReader):
    """Reads `.metadata`, a pickle, without letting it name anything but DCP's own records and PyTorch's sizes."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        known = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
                 ("collections", "OrderedDict"), ("pathlib", "PosixPath")}  # fmt: skip
        if dtype or (module, name) in known or _is_record(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a checkpoint's metadata")


def _is_record(module: str, name: str) -> bool:
    """Whether this is one of the plain classes that DCP's metadata is made of."""
    return module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem") and (
        name.endswith(("Metadata", "Properties", "Index", "Meta", "_StorageInfo", "_MEM_FORMAT_ENCODING"))
    )


def is_folder(path: Path) -> bool:
    """Whether `path` is a finished checkpoint of this kind."""
    return (path / STATE).is_file()


def check(path: Path, files: dict[str, int]) -> None:
    """Compare the checksums of all files. Raises `InputError` that names the first which is missing or damaged."""
    for name, wanted in files.items():
        file = path / name
        try:
            found = checksum(file)
        except OSError as error:
            raise InputError(f"checkpoint {path} cannot be read: {name}: {error.strerror}") from error
        if found != wanted:
            raise InputError(f"checkpoint {path} cannot be read: wrong checksum of {name}")


def read_tensors(path: Path, rest: State, like: Callable[[Keys], Tensor | None]) -> State:
    """Add the tensors to what `state.pt` holds, and have the state that a one-file checkpoint has.

    Args:
        like: the parameter to which the tensor at these keys belongs, where it is to come sharded as that is; None:
            it comes whole, on the CPU.
    """
    reader = _FolderReader(path)
    stored = reader.read_metadata().state_dict_metadata
    state = {name: value for name, value in rest.items() if name not in ("tensors", "files")}
    places = {key: tuple(keys) for key, keys in rest["tensors"].items()}
    tensors = {}
    for key, keys in places.items():
        size, dtype, parameter = stored[key].size, stored[key].properties.dtype, like(keys)
        fits = parameter is not None and parameter.shape == size
        tensors[key] = torch.empty_like(parameter, dtype=dtype) if fits else torch.empty(size, dtype=dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    for key, keys in places.items():
        inner = state
        for name in keys[:-1]:
            inner = inner[name]
        inner[keys[-1]] = tensors[key]
    return state


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def remove(path: Path) -> None:
    """Remove a checkpoint's file or folder; a folder loses its name first, so that no half of it is ever found."""
    if path.is_dir():
        aside = path.with_suffix(".old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk: after a rename, so that a power cut does not undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tensors(state: State) -> Iterator[tuple[Keys, Tensor]]:
    """The tensors of the model and the optimizer, with their places in the state."""
    for name, tensor in state["model"].items():
        yield ("model", name), tensor
    for index, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                yield ("optimizer", "state", index, name), value


def _join(keys: Keys) -> str:
    return "/".join(map(str, keys))
