"""What every tokenizer does alike: rows of one length, padding, the end token, and a memory of recent texts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cllip_fast.errors import InputError

PAD_ID = 0  # what the towers, the losses' text ids and the loader's empty places take for padding


class Tokenizer(ABC):
    """Texts to rows of token ids; built from the bytes of its file, which is also how it travels to other processes.

    Threads may share one, and a process that uses one may fork.

    Attributes:
        kind: name of the implementation.
        suffix: how the names of its files end.
        vocab_size: number of rows an embedding needs, the largest id + 1.
        pad_id: 0, for every kind.
        start_id: id that opens each row, None where the kind has none.
        end_id: id that closes each row; never 0, so that the last id that is not 0 is always this one.
        pad_in_text: True if 0 can also be a token of a text; a tower that masks padding would lose that token.
    """

    kind: ClassVar[str]
    suffix: ClassVar[str]
    pad_id: ClassVar[int] = PAD_ID
    vocab_size: int
    start_id: int | None
    end_id: int
    pad_in_text: bool

    def __init__(self, file: bytes) -> None:
        """Build from a file's contents; `InputError` if they are not this kind's."""
        self._file = file
        self._recent = _RecentTexts()

    @abstractmethod
    def _contents(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text alone, without start, end and padding."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The inverse of `_contents` for one text."""

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids of `texts`, int64 [len(texts), length].

        A row is the start token if the kind has one, the text, the end token, then zeros. A text that is too long is
        cut before the end token. Equal texts are tokenised once.

        Raises:
            InputError: `texts` is a lone string or holds something else than strings, or `length` < 1.
        """
        return torch.from_numpy(self.rows(texts, length))

    __call__ = encode

    def rows(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Like `encode`, but as a numpy array."""
        if isinstance(texts, str):
            raise InputError(f"texts is the string {texts[:40]!r}, expected a list of strings")
        if length < 1:
            raise InputError(f"length is {length}, expected at least 1, the end-of-text token")
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"texts holds {text!r} of type {type(text).__name__}, expected strings")
        known = {text: self._recent.get(text, length) for text in texts}
        fresh = [text for text, ids in known.items() if ids is None]
        start = [] if self.start_id is None else [self.start_id]
        for text, content in zip(fresh, self._contents(fresh) if fresh else [], strict=True):
            ids = np.array((start + content)[: length - 1] + [self.end_id], dtype=np.int32)
            known[text] = ids
            self._recent.put(text, length, ids)
        rows = np.full((len(texts), length), PAD_ID, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = known[text]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row [length]: what stands between the start token and the first end token."""
        content = [int(i) for i in ids]
        while content and content[-1] == PAD_ID:
            content.pop()
        if self.end_id in content:
            content = content[: content.index(self.end_id)]
        if content and content[0] == self.start_id:
            content = content[1:]
        return self._text(content).strip()

    def save(self, path: str | Path) -> None:
        """Write the file that `load_tokenizer` reads; `InputError` unless `path` ends with this kind's suffix."""
        if not str(path).endswith(self.suffix):
            raise InputError(f"path is {path}, expected a name ending with {self.suffix} for a {self.kind} tokenizer")
        Path(path).write_bytes(self._file)

    def describe(self) -> dict[str, object]:
        """Kind, sizes, ids and the file's SHA-256, as plain values for a log or a checkpoint."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "start_id": self.start_id,
            "end_id": self.end_id,
            "sha256": hashlib.sha256(self._file).hexdigest(),
        }

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return type(self), (self._file,)


class _RecentTexts:
    """Ids of recent (text, length) pairs: region texts repeat all the time.

    Two generations of bounded size: an entry in use moves to the young one, and the old one is dropped as a whole.
    There is no lock that a fork could find taken: threads that meet can at worst forget or repeat some work.
    """

    GENERATION = 1 << 15

    def __init__(self) -> None:
        self._young: dict[tuple[str, int], np.ndarray] = {}
        self._old: dict[tuple[str, int], np.ndarray] = {}

    def get(self, text: str, length: int) -> np.ndarray | None:
        ids = self._young.get((text, length))
        if ids is None:
            ids = self._old.get((text, length))
            if ids is not None:
                self.put(text, length, ids)
        return ids

    def put(self, text: str, length: int, ids: np.ndarray) -> None:
        if len(self._young) >= self.GENERATION:
            self._old, self._young = self._young, {}
        self._young[text, length] = ids
