"""Tokenizers from files of other projects' making: `tokenizers` JSON of several families, SentencePiece models."""

import io
import pickle
import sys

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from cllip_fast.data import load_tokenizer
from cllip_fast.errors import InputError
from cllip_fast.models.config import PRESETS
from cllip_fast.models.text import TextTower

WORDS = ["red", "blue", "circle", "square", "a"]


def word_file(tmp_path, special, template=None):
    """A file that knows a few words: `special` tokens have the first ids; `template` is put around each text."""
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    unknown = next((token for token in special if "unk" in token.lower()), special[-1])
    model = LibraryTokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.WordPiece()
    model.add_special_tokens([AddedToken(token, special=True) for token in special])
    if template:
        model.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, i) for i, token in enumerate(special)]
        )
    model.enable_padding(length=40, pad_id=1, pad_token=special[1])
    model.enable_truncation(4)
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


# family: special tokens, template, start, end, whether 0 can stand in a text
FAMILIES = {
    "bert": (["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]", 1, 2, False),
    "roberta": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", 0, 2, True),
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>", None, 1, False),
    "llama": (["<unk>", "<s>", "</s>"], "<s> $A", 1, 2, True),
    "gpt": (["!", "<|endoftext|>", "?"], None, None, 1, True),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    special, template, *ids = FAMILIES[request.param]
    return load_tokenizer(word_file(tmp_path, special, template)), ids


def test_a_files_own_tokens_stand_around_a_text(family):
    tokenizer, (start, end, pad_in_text) = family
    assert [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_in_text] == [start, end, pad_in_text]
    first = tokenizer.vocab_size - len(WORDS)
    opened = [] if start is None else [start]
    ids = [first + WORDS.index(word) for word in ("a", "red", "circle", "a", "blue", "square")]
    rows = tokenizer(["a red circle a blue square", "a", ""], 9)
    assert rows[0].tolist() == (opened + ids + [end] + [0, 0])[:9], "neither the file's cut nor its padding"
    assert rows[1].tolist() == (opened + ids[:1] + [end] + [0] * 9)[:9]
    assert rows[2].tolist() == (opened + [end] + [0] * 9)[:9]
    assert tokenizer(["a red circle"], 3)[0].tolist() == [*(opened + ids)[:2], end]
    assert tokenizer.decode(rows[0]) == "a red circle a blue square"


def test_a_special_name_in_a_text_is_text(family):
    tokenizer, (_, end, _) = family
    name = tokenizer._model.id_to_token(end)
    row = pickle.loads(pickle.dumps(tokenizer))([f"red {name}a red"], 12)[0]
    assert (row == end).sum() == 1


def test_the_causal_tower_pools_at_the_end_of_every_kind(family):
    tokenizer, _ = family
    torch.manual_seed(0)
    config = PRESETS["tiny"].to_dict() | {"causal_text": True, "vocab_size": tokenizer.vocab_size, "text_depth": 1}
    tower = TextTower(type(PRESETS["tiny"]).from_dict(config)).double()
    texts = ["a red circle", "blue", "", "red ! red"]
    with torch.no_grad():
        short = tower(tokenizer(texts, 8))
        alone = torch.cat([tower(row[: int((row == tokenizer.end_id).nonzero()[0]) + 1][None])
                           for row in tokenizer(texts, 30)])  # fmt: skip
    torch.testing.assert_close(short, alone)


def test_json_files_that_do_not_fit_are_refused(tmp_path):
    for special, template, message in (
        (["</s>", "<pad>", "<unk>"], "$A </s>", "'</s>' has id 0, which is padding"),
        (["<pad>", "<unk>", "?"], None, "no end token"),
        (["<pad>", "<s>", "</s>", "<en>"], "<s> $A </s> <en>", r"ids \[1\] before and \[2, 3\] after"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(word_file(tmp_path, special, template))


def sentence_piece_file(path, **ids):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    lines = [f"a {x} {y} left of {z} things" for x in WORDS for y in WORDS for z in ("two", "many")]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, **ids,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def test_a_sentence_piece_model_reads_as_t5_does(tmp_path):
    path = sentence_piece_file(tmp_path / "t5.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    tokenizer = load_tokenizer(path)
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_in_text) == (None, 1, False)
    assert tokenizer.vocab_size == plain.get_piece_size()
    texts = ["a red  circle", "", "日本 </s> red", "many things " * 20]
    rows = tokenizer(texts, 24)
    for text, row in zip(texts, rows, strict=True):
        ids = plain.encode(text)[:23] + [1]
        assert row.tolist() == ids + [0] * (24 - len(ids))
    assert tokenizer.decode(rows[0]) == "a red circle"
    tokenizer.save(tmp_path / "again.model")
    for again in (load_tokenizer(tmp_path / "again.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(again(texts, 24), rows)
        assert again.describe() == tokenizer.describe()


def test_sentence_piece_files_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    path = sentence_piece_file(tmp_path / "no_end.model", eos_id=-1, unk_id=0, bos_id=1)
    with pytest.raises(InputError, match="end token has id -1"):
        load_tokenizer(path)
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"no_end\.model: SentencePiece model cannot be read"):
        load_tokenizer(path)


def test_an_absent_sentencepiece_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "t5.model").write_bytes(b"")
    with pytest.raises(InputError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path / "t5.model")
