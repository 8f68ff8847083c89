"""OpenAI CLIP's vocabulary, with the ids that OpenCLIP's `SimpleTokenizer` gives (open_clip/tokenizer.py).

Text is repaired (ftfy), HTML entities are resolved twice, white space becomes single spaces, letters become lower
case. It is cut into runs of letters, single digits, runs of other signs and English contractions; each piece is
spelled in bytes, the last one marked, and joined by 48,894 merges (Radford et al. 2021, section 2.4).
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import re
import zlib
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from cllip_fast.data.tokenizers.base import Tokenizer
from cllip_fast.data.tokenizers.json_file import keep_forks_quiet
from cllip_fast.errors import InputError

_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2
_END_OF_WORD = "</w>"
_SPECIAL = ("<start_of_text>", "<end_of_text>")

# The original ignores case. In lower-case text that leaves two oddities: the long s counts as an s, and the iota
# subscript, a mark that is a letter in upper case, belongs nowhere and is left out.
_PIECES = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_NEEDS_NO_REPAIR = re.compile(r"[\t\n -%'-~]*")  # ASCII without control characters and entities


class ClipTokenizer(Tokenizer):
    """The tokenizer of CLIP and of most OpenCLIP models; built from the bytes of `bpe_simple_vocab_16e6.txt.gz`.

    Rows equal OpenCLIP's, except for letters newer than the Unicode tables of the `tokenizers` library. As there, the
    name of a special token in a text gives that token. 0 is padding and also the sign "!" with another sign behind it.
    """

    kind = "clip"
    suffix = ".txt.gz"
    pad_in_text = True

    def __init__(self, file: bytes) -> None:
        super().__init__(file)
        keep_forks_quiet()
        try:
            import ftfy
        except ImportError as error:
            raise InputError(
                "the clip tokenizer needs ftfy, which cannot be imported here: pip install ftfy"
            ) from error
        self._repair = ftfy.fix_text
        vocabulary, merges = _read(file)
        self._model = LibraryTokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
        self._model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._model.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_END_OF_WORD, " ")])
        self._spelled = {name: self._model.encode(name).ids for name in _SPECIAL}
        self.start_id, self.end_id = len(vocabulary), len(vocabulary) + 1
        self.vocab_size = len(vocabulary) + len(_SPECIAL)

    def clean(self, text: str) -> str:
        """The text that is cut into pieces: repaired, without entities, single spaces, lower case."""
        if not _NEEDS_NO_REPAIR.fullmatch(text):
            text = html.unescape(html.unescape(self._repair(text)))
        return " ".join(text.split()).lower()

    def _contents(self, texts: list[str]) -> list[list[int]]:
        cleaned = [self.clean(text) for text in texts]
        contents = [encoding.ids for encoding in self._model.encode_batch_fast(cleaned)]
        for i, text in enumerate(cleaned):
            for name, token in zip(_SPECIAL, (self.start_id, self.end_id), strict=True):
                if name in text:
                    contents[i] = _replaced(contents[i], self._spelled[name], token)
        return contents

    def _text(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def openclip_vocabulary() -> Path:
    """The vocabulary file inside the installed open_clip_torch, which is not imported; `InputError` without it."""
    package = importlib.util.find_spec("open_clip")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (path := Path(folder, _FILE)).is_file():
            return path
    raise InputError(
        f"the clip tokenizer needs {_FILE} of the package open_clip_torch, which is not installed: "
        f"pip install 'cllip-fast[open-clip]', or give the path of that file instead of clip"
    )


def _read(file: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: 256 bytes, the same at the end of a word, then one token a merge."""
    try:
        lines = gzip.decompress(file).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"CLIP vocabulary cannot be read: {error}") from error
    merges = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    # Printable Latin-1 stands for itself, the other bytes for the characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + _END_OF_WORD for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = all(len(merge) == 2 and set(merge) <= vocabulary.keys() for merge in merges)
    if not pairs or len(vocabulary) != 2 * 256 + _MERGES:
        raise InputError(f"CLIP vocabulary is not one: expected {_MERGES} different merges, two tokens a line")
    return vocabulary, merges


def _replaced(ids: list[int], spelled: list[int], token: int) -> list[int]:
    """`ids` with each run `spelled`, which only the piece of that name can give, as one token."""
    out: list[int] = []
    i = 0
    while i < len(ids):
        found = ids[i : i + len(spelled)] == spelled
        out.append(token if found else ids[i])
        i += len(spelled) if found else 1
    return out
