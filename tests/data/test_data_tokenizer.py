"""The trained tokenizer, and what all kinds share: rows of fixed length, the memory of texts, workers, bad input."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cllip_fast.data import load_tokenizer, train_bpe
from cllip_fast.data.tokenizers.base import _RecentTexts
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
    assert [row[row != 0][-1].item() for row in rows] == [small.end_id] * 3
    assert rows.max() < small.vocab_size


def test_a_long_text_is_cut_before_the_end_token(small):
    full, cut = small(TEXTS[:1], 20)[0], small(TEXTS[:1], 4)[0]
    assert cut.tolist() == [*full[:3].tolist(), small.end_id]
    assert small(TEXTS[:1], 1).tolist() == [[small.end_id]]


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


def test_decode_gives_the_text_back(small):
    texts = ["a small red circle", "zoë saw 日本 🙂", ""]
    rows = small(texts, 40)
    assert [small.decode(row) for row in rows] == texts
    assert small.decode(rows[0].tolist()[:3]) == "a small red", "part of a row"


def test_description_tells_files_apart(small):
    facts = small.describe()
    assert (facts["kind"], facts["pad_id"], facts["start_id"], facts["end_id"]) == ("json", 0, None, small.end_id)
    assert facts["vocab_size"] == small.vocab_size
    assert facts["sha256"] != train_bpe(["other words"] * 9, 400).describe()["sha256"]
    assert not small.pad_in_text


class Counted:
    """Counts the texts that a tokenizer really tokenises."""

    def __init__(self, tokenizer, monkeypatch):
        self.texts, inner = [], tokenizer._contents
        monkeypatch.setattr(tokenizer, "_contents", lambda texts: self.texts.extend(texts) or inner(texts))


def test_equal_texts_are_tokenised_once(monkeypatch):
    tokenizer = train_bpe(TEXTS, 400)
    counted = Counted(tokenizer, monkeypatch)
    tokenizer(["red", "blue", "red"], 8)
    tokenizer(["blue", "green"], 8)
    assert counted.texts == ["red", "blue", "green"]
    assert (tokenizer(["large blue dotted square"], 3) != 0).sum() == 3, "another length is another row"
    assert (tokenizer(["large blue dotted square"], 9) != 0).sum() == 5


def test_the_memory_is_bounded_and_keeps_what_is_in_use(monkeypatch):
    monkeypatch.setattr(_RecentTexts, "GENERATION", 5)
    tokenizer, fresh = train_bpe(TEXTS, 400), train_bpe(TEXTS, 400)
    counted = Counted(tokenizer, monkeypatch)
    for i in range(40):
        texts = ["always here", f"red {i} circle"]
        assert torch.equal(tokenizer(texts, 12), fresh(texts, 12))
    assert counted.texts.count("always here") == 1
    many = [f"red {i} circle" for i in range(30)] * 2
    assert torch.equal(tokenizer(many, 12), torch.cat([fresh([text], 12) for text in many]))
    assert len(tokenizer._recent._young) + len(tokenizer._recent._old) <= 10


def test_threads_may_share_one(monkeypatch):
    monkeypatch.setattr(_RecentTexts, "GENERATION", 7)
    shared, alone = train_bpe(TEXTS, 400), train_bpe(TEXTS, 400)
    jobs = [[f"red {(i * k) % 23} circle" for i in range(12)] for k in range(1, 200)]
    expected = [alone.rows(texts, 10) for texts in jobs]
    with ThreadPoolExecutor(8) as pool:
        for have, want in zip(pool.map(lambda texts: shared.rows(texts, 10), jobs), expected, strict=True):
            assert np.array_equal(have, want)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_rows_without_a_warning(method, capfd, monkeypatch):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = train_bpe(TEXTS, 400)
    texts = ["<pad> red circle", "Zoë"] + [f"{i}" for i in range(50)]
    expected = tokenizer.rows(texts, 16)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert np.array_equal(pool.apply(tokenizer.rows, (texts, 16)), expected)
    assert "tokenizers" not in capfd.readouterr().err


def test_it_travels_without_its_memory(small):
    small([f"{i} things" for i in range(500)], 8)
    data = pickle.dumps(small)
    assert len(data) < 2 * len(small._file)
    assert torch.equal(pickle.loads(data)(["<pad> a red thing"], 24), small(["<pad> a red thing"], 24))


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
    with pytest.raises(InputError, match=r"bad\.json: tokenizer file cannot be read"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"'bert', expected clip or the path of a file ending with \.json"):
        load_tokenizer("bert")
    with pytest.raises(InputError, match=r"t\.model, expected a name ending with \.json"):
        small.save(tmp_path / "t.model")
