"""`shards stat`: its numbers against ones worked out by hand and by numpy."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from cllip_fast.data import train_bpe
from cllip_fast.errors import InputError
from cllip_fast.shard_tools import gather_statistics
from cllip_fast.shard_tools.stat import summarise
from tests.shard_tools.tars import good, raw_tar, run, sample

CAPTIONS = ["a red square", "two", "two"]


@pytest.fixture
def shards(tmp_path):
    regions = [
        {"box": [0, 0, 50, 20], "text": "sky"},
        {"box": [0, 0, 200, 100], "text": "sky"},
        {"box": [1, 1, 2, 2], "text": "dog\x1b[2J"},
        {"box": [300, 0, 400, 10], "text": "outside"},
    ]
    large = {"width": 200, "height": 100, "regions": regions, "captions": CAPTIONS, "licence": "CC0"}
    sources = [{"source": f"https://example.org/{i}.jpg"} for i in range(3)]
    files = [file for i, change in enumerate(sources) for file in sample(f"s{i}", regions=[], **change)]
    one = raw_tar(tmp_path / "1.tar", [*sample("large", b"never decoded", **large), *files])
    two = raw_tar(
        tmp_path / "2.tar",
        [*sample("odd", source="my camera"), *sample("bad", captions=[]), *sample("vast", width=10**400)],
    )
    bad = tmp_path / "3.tar"
    bad.write_bytes(b"")
    return [one, two, bad]


def test_counts(shards):
    found = gather_statistics(shards)
    assert (found.shards, found.images, found.captions, found.regions) == (3, 5, 7, 4)
    assert found.left_out == {"bad region box": 1, "no caption": 1, "bad record": 1, "unreadable shard": 1}
    assert found.quantities["regions an image"] == {3: 1, 0: 3, 1: 1}
    assert found.quantities["captions an image"] == {3: 1, 1: 4}
    assert found.quantities["image width"] == {200: 1, 16: 4}
    assert found.quantities["aspect ratio"] == {2.0: 1, 1.0: 4}
    assert found.quantities["box area, %"] == {5.0: 1, 100.0: 1, 0.01: 1, round(100 * 49 / 256, 2): 1}
    assert found.quantities["caption, characters"] == Counter(map(len, CAPTIONS + ["a picture"] * 4))
    assert found.quantities["region text, characters"] == Counter({3: 2, 7: 1, 12: 1})
    assert found.region_texts.most_common(1) == [("sky", 2)]
    assert found.sources == {"example.org": 3, "my camera": 1, "unknown": 1}
    assert found.licences == {"CC0": 1, "unknown": 4}
    assert "caption, tokens" not in found.quantities


def test_tokens_are_counted_without_a_cut(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("cllip_fast.shard_tools.stat._TEXTS", 2)
    texts = ["a red square", "two", "a picture", "sky", "dog", "white square"]
    tokenizer = train_bpe(texts * 3, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    found = gather_statistics(shards, tmp_path / "tokenizer.json")
    length = lambda text: int((tokenizer([text], 100) != 0).sum())  # noqa: E731
    assert found.quantities["caption, tokens"] == Counter(map(length, CAPTIONS + ["a picture"] * 4))
    assert found.quantities["region text, tokens"] == Counter(map(length, ["sky", "sky", "dog\x1b[2J", "white square"]))
    for size in (61, 62, 63, 64, 65, 254, 255, 256, 5000):  # about the lengths of the rows tried
        long = raw_tar(tmp_path / "long.tar", sample("x", captions=["q " * size]))
        expected = int((tokenizer(["q " * size], 20_000) != 0).sum())
        assert gather_statistics([long], tmp_path / "tokenizer.json").quantities["caption, tokens"] == {expected: 1}
    with pytest.raises(InputError, match="does not exist"):
        gather_statistics(shards, tmp_path / "none.json")


def test_percentiles_are_those_of_the_values():
    rng = np.random.default_rng(0)
    for size in (1, 2, 19, 100, 1001):
        values = rng.integers(0, 50, size)
        summary = summarise(Counter(values.tolist()))
        for percent in (5, 25, 50, 75, 95, 99):
            assert summary[f"p{percent}"] == np.percentile(values, percent, method="inverted_cdf")
        assert (summary["min"], summary["max"]) == (values.min(), values.max())
        assert summary["mean"] == pytest.approx(values.mean())


def test_the_command_prints_a_table_and_writes_json(shards, tmp_path, capsys):
    assert run("stat", *shards, "--json", tmp_path / "stat.json") == 0
    text = capsys.readouterr().out
    assert "3 shards, 5 images, 7 captions, 4 regions" in text
    assert "\x1b" not in text, "no terminal codes from data"
    assert "dog\\x1b[2J" in text
    written = json.loads((tmp_path / "stat.json").read_text())
    assert written["quantities"]["image width"]["max"] == 200
    assert written["region_texts"] == {"different": 3, "most_frequent": {"sky": 2, "dog\x1b[2J": 1, "white square": 1}}


def test_nothing_readable_is_no_error(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"")
    assert run("stat", tmp_path) == 0
    assert "1 × unreadable shard" in capsys.readouterr().out


def test_all_shards_count(tmp_path):
    raw_tar(tmp_path / "1.tar", good("a", 3))
    raw_tar(tmp_path / "2.tar", good("b", 4))
    assert gather_statistics([tmp_path / "1.tar", tmp_path / "2.tar"]).region_texts == {"white square": 7}
