"""Texts to token ids: the tokenizer of a name or a file."""

from __future__ import annotations

from pathlib import Path

from cllip_fast.data.tokenizers.base import Tokenizer
from cllip_fast.data.tokenizers.clip import ClipTokenizer, openclip_vocabulary
from cllip_fast.data.tokenizers.json_file import JsonTokenizer, train_bpe
from cllip_fast.data.tokenizers.sentence_piece import SentencePieceTokenizer
from cllip_fast.errors import InputError

__all__ = ["Tokenizer", "load_tokenizer", "train_bpe"]

_KINDS: tuple[type[Tokenizer], ...] = (JsonTokenizer, SentencePieceTokenizer, ClipTokenizer)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: "clip", OpenAI CLIP's vocabulary as the installed open_clip_torch holds it; or a file: *.json of the
            `tokenizers` library (such as `train_bpe` makes), *.model of SentencePiece, *.txt.gz with CLIP's merges.

    Raises:
        InputError: an unknown name, a file that is missing or malformed, or an optional package that is absent.
    """
    path = openclip_vocabulary() if name == "clip" else Path(name)
    for kind in _KINDS:
        if path.name.endswith(kind.suffix):
            if not path.is_file():
                raise InputError(f"tokenizer file {path} does not exist")
            try:
                return kind(path.read_bytes())
            except InputError as error:
                raise InputError(f"tokenizer {path}: {error}") from error
    suffixes = ", ".join(kind.suffix for kind in _KINDS)
    raise InputError(f"tokenizer is {str(name)!r}, expected clip or the path of a file ending with {suffixes}")
