"""`shards split`: every usable sample arrives once with the same bytes, or nothing is written at all."""

from __future__ import annotations

import collections
import errno
import itertools
import shutil

import pytest

from cllip_fast.data.faults import FaultCounter
from cllip_fast.data.index import expand_shards, index_shards
from cllip_fast.errors import InputError
from cllip_fast.shard_tools import split, split_shards
from tests.data.painted import jpeg
from tests.shard_tools.tars import contents, good, raw_tar, run, sample


def keys_by_shard(folder):
    """The keys in each shard of a folder, as training reads them."""
    result = []
    for path in expand_shards(folder):
        faults = FaultCounter()
        result.append(index_shards([[path]], faults).keys)
        assert not faults.counts
    return result


def keys(folder):
    return list(itertools.chain(*keys_by_shard(folder)))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 6, 6 and 5 samples."""
    return [raw_tar(tmp_path / "in" / f"{i}.tar", good(f"s{i}-", n)) for i, n in enumerate((6, 6, 5))]


NAMES = [f"s{i}-{j}" for i, n in enumerate((6, 6, 5)) for j in range(n)]


def test_samples_per_shard(tmp_path, shards):
    summary = split_shards(shards, tmp_path / "out", samples_per_shard=7)
    assert summary.written == {"": (17, 3)}
    assert keys_by_shard(tmp_path / "out") == [NAMES[:7], NAMES[7:14], NAMES[14:]]
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["000000.tar", "000001.tar", "000002.tar"]


def test_number_of_shards(tmp_path, shards):
    split_shards(shards, tmp_path / "out", shards=5)
    found = keys_by_shard(tmp_path / "out")
    assert list(itertools.chain(*found)) == NAMES
    assert sorted(map(len, found)) == [3, 3, 3, 4, 4]


def test_all_files_keep_their_names_and_bytes(tmp_path):
    files = [
        *sample("folder/" + "ü" * 80),
        ("a.cls", b"7"),
        *sample("a", suffix="JPG"),
        *sample("b"),
        ("a.txt", b"\xe9"),
    ]
    path = raw_tar(tmp_path / "in.tar", files)
    split_shards([path], tmp_path / "out", shards=2)
    copied = [contents(p) for p in expand_shards(tmp_path / "out")]
    assert copied[0] | copied[1] == dict(files)
    assert set(copied[0]) == {name for name, _ in files if "ü" in name}


def test_shuffles_by_seed_and_gives_the_same_bytes_again(tmp_path, shards):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split_shards(shards, tmp_path / name, shards=2, shuffle=seed)
    orders = {name: keys(tmp_path / name) for name in "abc"}
    assert sorted(orders["a"]) == sorted(NAMES)
    assert orders["a"] == orders["b"] != NAMES
    assert orders["c"] != orders["a"]
    for first, second in zip(expand_shards(tmp_path / "a"), expand_shards(tmp_path / "b"), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_validation_depends_on_the_key_alone(tmp_path, shards):
    more = [*shards, raw_tar(tmp_path / "in" / "3.tar", good("more", 200))]
    split_shards(shards, tmp_path / "few", samples_per_shard=4, val_share=0.3)
    summary = split_shards(more, tmp_path / "many", shards=6, shuffle=3, val_share=0.3)
    few, many = ({part: set(keys(tmp_path / name / part)) for part in ("train", "val")}
                 for name in ("few", "many"))  # fmt: skip
    assert few["train"] | few["val"] == set(NAMES)
    assert not few["train"] & few["val"]
    assert few["val"]
    assert few["val"] == many["val"] & set(NAMES)
    assert len(many["val"]) == pytest.approx(0.3 * 217, abs=25)
    assert summary.written == {"train": (len(many["train"]), 6), "val": (len(many["val"]), summary.written["val"][1])}
    train, val = ({len(k) for k in keys_by_shard(tmp_path / "many" / part)} for part in ("train", "val"))
    assert max(val) <= max(train), "validation shards are no larger"


def test_broken_and_repeated_samples_are_left_out_and_reported(tmp_path, shards, capsys):
    bad = [*sample("cut", jpeg()[:300]), *sample("s0-0"), ("alone.jpg", jpeg()), *sample("../up"), *sample("fine")]
    raw_tar(tmp_path / "in" / "3.tar", bad)
    (tmp_path / "in" / "4.tar").write_bytes(b"")
    assert run("split", tmp_path / "in", "--out", tmp_path / "out", "--samples-per-shard", 100, "--workers", 0) == 0
    assert keys(tmp_path / "out") == [*NAMES, "fine"]
    text = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 18 samples in 1 shards" in text
    assert "left out: 1 samples whose key an earlier one has" in text
    for kind in ("broken image", "missing record", "unsafe name", "unreadable shard"):
        assert f"× {kind}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of them"),
        ({"shards": 2, "samples_per_shard": 2}, "expected one of them"),
        ({"shards": 0}, "shards is 0"),
        ({"samples_per_shard": -1}, "samples_per_shard is -1"),
        ({"shards": 18}, "shards is 18, expected at most one a sample, 17 here"),
        ({"shards": 1, "val_share": 1.0}, "val_share is 1.0"),
        ({"shards": 1, "val_share": 1e-9}, "no sample for val"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(tmp_path, shards, arguments, message):
    with pytest.raises(InputError, match=message):
        split_shards(shards, tmp_path / "out", **arguments)
    assert not [p for p in tmp_path.iterdir() if p.name != "in" and p.suffix != ".lock"]


def test_the_command_passes_everything_on(tmp_path, shards, capsys):
    split_shards(shards, tmp_path / "wanted", shards=2, shuffle=5, val_share=0.3)
    options = ["--shards", 2, "--shuffle", 5, "--val-share", 0.3, "--workers", 1]
    assert run("split", *shards, "--out", tmp_path / "out", *options) == 0
    assert f"{tmp_path / 'out' / 'train'}: " in capsys.readouterr().out
    wanted, found = ({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.tar")}
                     for name in ("wanted", "out"))  # fmt: skip
    assert found == wanted


def test_nothing_is_overwritten(tmp_path, shards, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.tar").write_bytes(b"mine")
    monkeypatch.setattr(split, "examine_shards", lambda *_, **__: pytest.fail("looked before the folder was refused"))
    with pytest.raises(InputError, match="exists and is not empty"):
        split_shards(shards, tmp_path / "out", shards=1)
    assert (tmp_path / "out" / "000000.tar").read_bytes() == b"mine"


def test_a_full_disk_is_said_before_and_while_writing(tmp_path, shards, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    needed = sum(-(-len(data) // 512) * 512 + 512 for path in shards for data in contents(path).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(InputError, match="GB are free"):
        split_shards(shards, tmp_path / "out", shards=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(split.tarfile.TarFile, "addfile", full)
    with pytest.raises(InputError, match=r"out cannot be written: No space left on device; it was not made"):
        split_shards(shards, tmp_path / "out", shards=1)
    assert not [p for p in tmp_path.iterdir() if p.name != "in" and p.suffix != ".lock"]


def test_shards_that_change_meanwhile_are_noticed(tmp_path, shards, monkeypatch):
    honest = split._write

    def shrink_first(*arguments):
        shards[1].write_bytes(b"")
        honest(*arguments)

    monkeypatch.setattr(split, "_write", shrink_first)
    with pytest.raises(InputError, match="the shards changed while they were copied"):
        split_shards(shards, tmp_path / "out", shards=1)
    assert not (tmp_path / "out").exists()
