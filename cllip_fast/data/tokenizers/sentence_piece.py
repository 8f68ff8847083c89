"""A SentencePiece model, as T5 and SigLIP have; needs the package `sentencepiece`."""

from __future__ import annotations

from cllip_fast.data.tokenizers.base import PAD_ID, Tokenizer
from cllip_fast.errors import InputError


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file: its own normaliser and pieces, the model's end token and no start token, as T5 reads texts.

    Rows are padded with 0, T5's padding. Text goes in as it is: SigLIP's models expect it in lower case without
    punctuation.
    """

    kind = "sentencepiece"
    suffix = ".model"
    start_id = None

    def __init__(self, file: bytes) -> None:
        super().__init__(file)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise InputError(
                "a SentencePiece model needs sentencepiece, which cannot be imported here: pip install sentencepiece"
            ) from error
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(file)
        except RuntimeError as error:
            raise InputError(f"SentencePiece model cannot be read: {error}") from error
        self.vocab_size = self._model.get_piece_size()
        self.end_id = self._model.eos_id()
        if self.end_id <= PAD_ID:
            raise InputError(
                f"SentencePiece model's end token has id {self.end_id}, expected a positive one: 0 is padding"
            )
        self.pad_in_text = self._model.pad_id() != PAD_ID

    def _contents(self, texts: list[str]) -> list[list[int]]:
        # One thread: a process that started more must not fork loader workers.
        return self._model.encode(texts, out_type=int, num_threads=1)

    def _text(self, ids: list[int]) -> str:
        return self._model.decode(ids)
