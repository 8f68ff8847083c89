"""Any file of the `tokenizers` library, and byte-pair encodings trained on the data set's own texts, which make one.

A trained one lower-cases the text and cuts it at white space and punctuation; each piece is marked at its start and
spelled in bytes, and the merges learned from the training texts join the bytes again: a frequent word becomes one
token and no text is unknown.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cllip_fast.data.tokenizers.base import PAD_ID, Tokenizer
from cllip_fast.errors import InputError

PAD, EOT = "<pad>", "<eot>"
_PAD_NAMES = (PAD, "[PAD]")
_END_NAMES = (EOT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "[EOS]")


class JsonTokenizer(Tokenizer):
    """A `tokenizers` JSON file: its own normaliser, cutting and model.

    The start and end tokens are those that the file's post-processor puts around a text; where it puts no end, the
    vocabulary's token of a customary name is taken. The file's own padding and truncation are left aside: rows are
    padded with 0. A special token's name inside a text is text like any other.
    """

    kind = "json"
    suffix = ".json"

    def __init__(self, file: bytes) -> None:
        super().__init__(file)
        keep_forks_quiet()
        try:
            model = LibraryTokenizer.from_str(file.decode())
        except Exception as error:  # the library raises plain Exception on a malformed file
            raise InputError(f"tokenizer file cannot be read: {error}") from error
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.start_id, self.end_id = _around(model)
        self.pad_in_text = model.id_to_token(PAD_ID) not in _PAD_NAMES

    def _contents(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def _text(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Learn a vocabulary of at most `vocab_size` ids from `texts`.

    Raises:
        InputError: `vocab_size` < 258, the two special tokens and 256 bytes.
    """
    if vocab_size < 258:
        raise InputError(f"vocab_size is {vocab_size}, expected at least 258: two special tokens and 256 bytes")
    keep_forks_quiet()
    bpe = LibraryTokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # add_prefix_space marks the start of every piece, so "blue berry" and "blueberry" stay two different texts.
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(words)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return JsonTokenizer(bpe.to_str(pretty=True).encode())


def keep_forks_quiet() -> None:
    """Batches are too small for the library's threads, and a process that used them must not fork loader workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _around(model: LibraryTokenizer) -> tuple[int | None, int]:
    """The ids that open and close each text, seen around a probe."""
    probe = model.encode("a")
    added = list(zip(probe.ids, probe.special_tokens_mask, strict=True))
    before = [i for i, _ in itertools.takewhile(lambda pair: pair[1], added)]
    after = [i for i, _ in itertools.takewhile(lambda pair: pair[1], reversed(added))]
    if not after:
        after = [i for i in map(model.token_to_id, _END_NAMES) if i is not None][:1]
    if not after:
        raise InputError(
            f"tokenizer file has no end token: its post-processor adds none and none is called {', '.join(_END_NAMES)}"
        )
    if len(before) > 1 or len(after) > 1:
        raise InputError(
            f"tokenizer file puts ids {before} before and {after[::-1]} after a text, expected at most one and one"
        )
    if after[0] == PAD_ID:
        raise InputError(f"tokenizer file's end token {model.id_to_token(PAD_ID)!r} has id {PAD_ID}, which is padding")
    return (before[0] if before else None), after[0]
