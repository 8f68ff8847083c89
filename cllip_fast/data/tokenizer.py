"""Texts to token ids: a byte-pair encoding trained on the data set's own texts.

Lower-cased text is cut at white space and punctuation, each piece is marked at its start and spelled in bytes, and the
merges learned from the training texts join the bytes again; a frequent word becomes one token and no text is unknown.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from cllip_fast.errors import InputError

PAD, EOT = "<pad>", "<eot>"
PAD_ID = 0
_CACHED_ROWS = 1 << 16


class Tokenizer:
    """Callable that turns texts into rows of token ids; made by `train_bpe` or `load_tokenizer`.

    Rows of texts seen before come from a bounded cache: region texts repeat all the time.
    """

    def __init__(self, bpe: BpeTokenizer) -> None:
        """Wrap a `tokenizers` tokenizer that has `<pad>` as id 0 and `<eot>`; `InputError` if it has not."""
        _keep_forks_quiet()
        if bpe.token_to_id(PAD) != PAD_ID or bpe.token_to_id(EOT) is None:
            raise InputError(f"tokenizer lacks {PAD} as id {PAD_ID} or {EOT}; expected a file made by Tokenizer.save")
        bpe.encode_special_tokens = True  # "<pad>" inside a caption is text like any other, not a padding token
        self._bpe = bpe
        self._eot_id = bpe.token_to_id(EOT)
        self._cache: dict[tuple[str, int], np.ndarray] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids, padding included."""
        return self._bpe.get_vocab_size()

    @property
    def eot_id(self) -> int:
        """Id of the token that closes each text."""
        return self._eot_id

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids of `texts`, int64 [len(texts), length].

        The last token that is not padding (0) is the end-of-text token; a text that is too long is cut before it.

        Raises:
            InputError: `texts` is a lone string or holds something else than strings, or `length` < 1.
        """
        return torch.from_numpy(self.rows(texts, length))

    def rows(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Like calling the tokenizer, but as a numpy array."""
        if isinstance(texts, str):
            raise InputError(f"texts is the string {texts[:40]!r}, expected a list of strings")
        if length < 1:
            raise InputError(f"length is {length}, expected at least 1, the end-of-text token")
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"texts holds {text!r} of type {type(text).__name__}, expected strings")
        rows = np.zeros((len(texts), length), dtype=np.int64)
        missing = [text for text in dict.fromkeys(texts) if (text, length) not in self._cache]
        fresh = dict(zip(missing, self._encode(missing, length), strict=True))
        for row, text in zip(rows, texts, strict=True):
            row[:] = fresh[text] if text in fresh else self._cache[text, length]
        if len(self._cache) + len(fresh) > _CACHED_ROWS:
            self._cache.clear()
        self._cache.update({(text, length): row for text, row in fresh.items()})
        return rows

    def _encode(self, texts: list[str], length: int) -> np.ndarray:
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, encoding in zip(rows, self._bpe.encode_batch_fast(texts), strict=True):
            ids = encoding.ids[: length - 1] + [self._eot_id]
            row[: len(ids)] = ids
        return rows

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as a `tokenizers` JSON file."""
        self._bpe.save(str(path))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of at most `vocab_size` ids from `texts`.

    Raises:
        InputError: `vocab_size` < 258, the two special tokens and 256 bytes.
    """
    if vocab_size < 258:
        raise InputError(f"vocab_size is {vocab_size}, expected at least 258: two special tokens and 256 bytes")
    _keep_forks_quiet()
    bpe = BpeTokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # add_prefix_space marks the start of every piece, so "blue berry" and "blueberry" stay two different texts.
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(words)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer written by `Tokenizer.save`; `InputError` if the file is missing or not such a file."""
    if not Path(path).is_file():
        raise InputError(f"tokenizer file {path} does not exist")
    try:
        bpe = BpeTokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception on a malformed file
        raise InputError(f"tokenizer file {path} cannot be read: {error}") from error
    return Tokenizer(bpe)


def _keep_forks_quiet() -> None:
    """Batches are too small for the library's threads, and a process that used them must not fork loader workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
