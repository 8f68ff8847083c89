"""The tokenizer: rows of fixed length, whole words, nothing unknown, nothing that looks like padding."""

import pytest
import torch

from cllip_fast.data import load_tokenizer, train_bpe
from cllip_fast.data import tokenizer as tokenizer_module
from cllip_fast.errors import InputError

TEXTS = ["a small red striped circle left of a large blue dotted square"] * 20


@pytest.fixture(scope="module")
def small():
    return train_bpe(TEXTS, 400)


def test_rows_are_padded_with_zero_and_closed(small):
    rows = small(["small red circle", "", "red"], 6)
    assert rows.shape == (3, 6)
    assert rows.dtype == torch.int64
    assert (rows != 0).sum(1).tolist() == [4, 1, 2], "trained words are one token each, plus the end"
    assert [row[row != 0][-1].item() for row in rows] == [small.eot_id] * 3
    assert rows.max() < small.vocab_size


def test_a_long_text_is_cut_before_the_end_token(small):
    full, cut = small(TEXTS[:1], 20)[0], small(TEXTS[:1], 4)[0]
    assert cut.tolist() == [*full[:3].tolist(), small.eot_id]
    assert small(TEXTS[:1], 1).tolist() == [[small.eot_id]]


def test_case_is_ignored_and_word_limits_are_not(small):
    rows = small(["Small RED", "small red", "smallred", "small  red"], 16)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[2])


def test_any_text_is_known_and_special_tokens_in_it_are_text(small):
    rows = small(["Zoë saw 日本 \u0000 🙂", "<pad> <eot> red"], 64)
    for row in rows:
        content = row[: int((row != 0).nonzero().max())]
        assert (content > 1).all(), "neither padding nor the end token inside a text"
    assert (rows != 0).sum(1).min() > 6


def test_saved_and_loaded_tokenizers_agree(small, tmp_path):
    small.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    texts = ["a Small red, striped thing", "<pad>", "日本"]
    assert torch.equal(small(texts, 24), again(texts, 24))
    assert small.vocab_size == again.vocab_size


def test_a_full_cache_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_CACHED_ROWS", 5)
    texts = [f"red {i} circle" for i in range(9)] + ["red 1 circle"]
    expected = torch.cat([train_bpe(TEXTS, 400)([text], 12) for text in texts])
    for _ in range(3):
        assert torch.equal(small(texts, 12), expected)


def test_bad_input_is_refused(small, tmp_path):
    with pytest.raises(InputError, match="texts is the string 'red', expected a list"):
        small("red", 4)
    with pytest.raises(InputError, match="NoneType"):
        small(["red", None], 4)
    with pytest.raises(InputError, match="length is 0"):
        small(["red"], 0)
    with pytest.raises(InputError, match="vocab_size is 100"):
        train_bpe(TEXTS, 100)
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad\.json cannot be read"):
        load_tokenizer(tmp_path / "bad.json")
