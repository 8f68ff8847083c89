"""Broken shards, images and records: refused where nothing can be done, else counted, logged once and left out."""

import errno
import io
import json
import logging
import os
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from cllip_fast.data import expand_shards
from cllip_fast.data.faults import Fault, FaultCounter
from cllip_fast.data.record import RecordError, parse_record
from cllip_fast.data.shards import ShardError, ShardReader, list_members
from cllip_fast.errors import InputError
from tests.data.painted import jpeg, record, write_shard


def good(prefix="g", count=6):
    regions = [{"box": [2, 2, 9, 9], "text": "white square"}]
    return [(f"{prefix}{i}", jpeg(16, 16, (2, 2, 9, 9)), record(regions=regions)) for i in range(count)]


def raw_shard(path, files):
    """A tar of (name, bytes) with nothing checked."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(made):
    return [key for batch in made for key in batch.keys]


# Shard names


def test_specs_expand_to_files(tmp_path):
    for name in ("0000", "0001", "0002", "extra"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    names = lambda spec: [path.stem for path in expand_shards(spec)]  # noqa: E731
    assert names(tmp_path) == ["0000", "0001", "0002", "extra"]
    assert names(f"{tmp_path}/{{0000..0002}}.tar") == ["0000", "0001", "0002"]
    assert names(f"{tmp_path}/{{0002,extra}}.tar::{tmp_path}/0000.tar") == ["0002", "extra", "0000"]
    assert names(f"{tmp_path}/000*.tar") == ["0000", "0001", "0002"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}/none.tar", "none.tar does not exist"),
        ("{0}/{{0000..0001}}.tar", "0001.tar does not exist"),
        ("{0}/{{3..1}}.tar", r"range \{3\.\.1\}"),
        ("{0}/0000.tar::", "an empty part"),
        ("{0}/sub", r"holds no \*\.tar file"),
        ("{0}/above", "its folders train do"),
    ],
)
def test_specs_that_name_nothing_are_refused(tmp_path, spec, message):
    (tmp_path / "0000.tar").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "above" / "train").mkdir(parents=True)
    (tmp_path / "above" / "train" / "0.tar").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        expand_shards(spec.format(tmp_path))


# Shards


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    whole = write_shard(tmp_path, good(count=2)).read_bytes()
    content_end = max(-(-(m.offset + m.size) // 512) * 512 for m in list_members(tmp_path / "000000.tar"))
    for length in {0, 1, 511, 512, 700, 1024, content_end - 512, content_end - 1, content_end, content_end + 100}:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ShardError):
            list_members(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    "content", [b"", b"not a tar at all" * 100, b"\x1f\x8b" + bytes(2000), b"{}", "cut"], ids=lambda c: str(c[:8])
)
def test_an_unreadable_shard_alone_is_refused_and_among_good_ones_counted(tmp_path, loader, caplog, content):
    whole = write_shard(tmp_path, good()).read_bytes()
    bad = tmp_path / "bad.tar"
    bad.write_bytes(whole[: len(whole) // 3] if content == "cut" else content)
    with pytest.raises(InputError, match=r"no shard can be read \(1 of 1\); first: .*bad\.tar"):
        loader(bad)
    with caplog.at_level(logging.WARNING, logger="cllip_fast.data"):
        made = loader(tmp_path)
    assert made.skipped == {"unreadable shard": 1}
    assert "bad.tar" in caplog.text
    assert read_all(made) == [f"g{i}" for i in range(6)]


def test_a_tar_without_samples_is_refused(tmp_path, loader):
    raw_shard(tmp_path / "a.tar", [("readme.txt", b"hello")])
    raw_shard(tmp_path / "b.tar", [])
    with pytest.raises(InputError, match=r"no sample in 2 shards.*empty shard 2"):
        loader(tmp_path)


def test_unsafe_and_incomplete_members_are_counted(tmp_path, loader, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = json.dumps(record()).encode()
    files = [(f"{key}.{suffix}", jpeg() if suffix == "jpg" else text)
             for key in ("fine", "/absolute", "../up", "a/../b") for suffix in ("jpg", "json")]  # fmt: skip
    files += [("alone.jpg", jpeg()), ("lonely.json", text), ("fine.jpg", jpeg()), ("fine.txt", b"ignored")]
    path = raw_shard(tmp_path / "a.tar", files)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    made = loader(path)
    assert read_all(made) == ["fine"]
    assert made.skipped == Counter({"unsafe name": 6, "missing record": 1, "missing image": 1, "duplicate member": 1,
                                    "not a regular file": 1})  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"], "nothing is extracted"


def test_long_names_and_pax_headers_are_read(tmp_path, loader):
    key = "folder/" + "long" * 40 + "ü"
    raw_shard(tmp_path / "a.tar", [(f"{key}.JPG", jpeg()), (f"{key}.json", json.dumps(record()).encode())])
    assert read_all(loader(tmp_path)) == [key]


def test_a_shard_that_vanishes_or_shrinks_later_is_counted(tmp_path, loader):
    write_shard(tmp_path, good("a", 3), first=0)
    write_shard(tmp_path, good("b", 3), first=1)
    made = loader(tmp_path)
    (tmp_path / "000000.tar").write_bytes(b"")
    assert read_all(made) == ["b0", "b1", "b2"]
    assert made.skipped == {"unreadable shard": 3}


# Images and records

BROKEN = [
    ("truncated", jpeg()[:300], record(), "broken image"),
    ("no-image", b"these are no pixels", record(), "broken image"),
    ("empty", b"", record(), "broken image"),
    ("other-size", jpeg(20, 16), record(), "size differs from record"),
    ("no-captions", jpeg(), {"width": 16, "height": 16}, "no caption"),
    ("blank-caption", jpeg(), record(captions=["  ", 3]), "no caption"),
    ("list", jpeg(), [1, 2], "bad record"),
    ("no-size", jpeg(), {"captions": ["a"]}, "bad record"),
    ("regions", jpeg(), record(regions={"box": 1}), "bad record"),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_broken_samples_out(tmp_path, loader, caplog, workers):
    write_shard(tmp_path, [entry[:3] for entry in BROKEN] + good())
    made = loader(tmp_path, workers=workers)
    with caplog.at_level(logging.WARNING, logger="cllip_fast.data"):
        assert read_all(made) == [f"g{i}" for i in range(6)]
    expected = Counter(kind for *_, kind in BROKEN)
    assert made.skipped == expected
    lines = [entry.getMessage() for entry in caplog.records]
    assert len(lines) == len(expected), "the first of each kind is logged"
    assert any("broken image" in line and "000000.tar: truncated" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_puts_the_same_substitute_in_place_everywhere(tmp_path, loader, workers):
    write_shard(tmp_path, good(count=12) + [entry[:3] for entry in BROKEN])

    def batches(**changes):
        stream = loader(tmp_path, train=True, workers=workers, **changes).forever()
        return [next(stream).keys for _ in range(5)]

    whole = batches(batch_size=4)
    assert {len(keys) for keys in whole} == {4}
    assert {key[0] for keys in whole for key in keys} == {"g"}
    halves = [batches(batch_size=2, rank=r, world_size=2) for r in range(2)]
    assert whole == [a + b for a, b in zip(*halves, strict=True)]


def test_training_counts_what_it_replaced(tmp_path, loader):
    write_shard(tmp_path, [*good(count=3), ("x", jpeg()[:300], record())])
    made = loader(tmp_path, train=True, batch_size=4)
    stream = made.forever()
    for epoch in range(1, 4):
        assert len(next(stream)) == 4
        assert made.skipped == {"broken image": epoch}
        assert made.counts == {"samples_seen": 3 * epoch, "samples_skipped": epoch, "samples_total": 4 * epoch}


@pytest.mark.parametrize("workers", [0, 2])
def test_seen_and_skipped_are_the_total_and_in_the_log(tmp_path, loader, caplog, workers):
    regions = [{"box": [9, 9, 2, 2], "text": "reversed"}, {"box": [0, 0, 5, 5], "text": "fine"}]
    write_shard(tmp_path, [entry[:3] for entry in BROKEN] + good(count=18) + [("r", jpeg(), record(regions=regions))])
    made = loader(tmp_path, train=True, batch_size=7, workers=workers)
    with caplog.at_level(logging.INFO, logger="cllip_fast.data"):
        stream = made.forever()
        for _ in range(4):
            next(stream)
    assert made.counts == {"samples_seen": 19, "samples_skipped": 9, "samples_total": 28}
    assert made.skipped == Counter(kind for *_, kind in BROKEN) + Counter({"bad region box": 1})
    (line,) = [line.getMessage() for line in caplog.records if "epoch 0 ends" in line.getMessage()]
    assert "19 samples seen + 9 skipped = 28; left out: broken image 3" in line
    evaluated = loader(tmp_path, batch_size=7, workers=workers)
    assert len(read_all(evaluated)) == 19
    assert evaluated.counts == made.counts


def test_too_many_broken_samples_end_training_with_a_clear_error(tmp_path, loader):
    write_shard(tmp_path, good(count=80) + [(f"x{i}", jpeg()[:300], record()) for i in range(20)])

    def batches(count, **changes):
        made = loader(tmp_path, train=True, batch_size=10, image_size=16, **changes)
        stream = made.forever()
        for _ in range(count):
            next(stream)
        return made

    expected = (
        r"of the last \d+ samples cannot be used \(broken image \d+\), more than max_broken 0.05 of 1000; last .*x"
    )
    assert batches(20).counts["samples_skipped"] == 40, "not yet more than 5 % of a thousand"
    with pytest.raises(InputError, match=expected):
        batches(40)
    assert batches(150, max_broken=0.25).counts["samples_skipped"] == 300
    with pytest.raises(InputError, match=r"more than max_broken 0\.19 of 1000"):
        batches(150, max_broken=0.19)
    with pytest.raises(InputError, match="max_broken 0 "):
        batches(5, max_broken=0.0)
    with pytest.raises(InputError, match=r"max_broken is 1\.5, expected 0 to 1"):
        batches(0, max_broken=1.5)
    assert len(read_all(loader(tmp_path))) == 80, "evaluation only counts"


def test_the_window_holds_whole_batches_and_forgets_old_ones():
    fault = Fault("broken image", "s", "k", "d")
    counter = FaultCounter(max_broken=0.05)
    counter.add_batch(4096, [fault] * 200, [])  # 4.9 % of a batch larger than the window
    for _ in range(30):
        counter.add_batch(100, [], [])
    counter.add_batch(100, [fault] * 45, [])
    for _ in range(9):
        counter.add_batch(100, [], [])
    counter.add_batch(100, [fault] * 50, [])
    with pytest.raises(InputError, match="51 of the last 1000 samples"):
        counter.add_batch(100, [fault], [])
    assert (counter.total, counter.skipped) == (4096 + 3000 + 1200, 296)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["vanishes", "truncated"])
def test_a_shard_lost_in_mid_epoch_is_replaced_and_counted(tmp_path, loader, workers, harm):
    write_shard(tmp_path, good("a", 40), first=0)
    write_shard(tmp_path, good("b", 40), first=1)
    made = loader(tmp_path, train=True, batch_size=4, workers=workers, max_broken=1.0)
    stream = made.forever()
    seen = [next(stream).keys for _ in range(3)]
    lost = tmp_path / "000000.tar"
    if harm == "truncated":
        with open(lost, "r+b") as file:
            file.truncate(700)
    else:
        lost.unlink()  # who has it open may go on, all others lose it
    seen += [next(stream).keys for _ in range(37)]  # to the end of the second epoch
    assert {len(keys) for keys in seen} == {4}
    counts = made.counts
    assert counts["samples_total"] == 160
    assert counts["samples_seen"] + counts["samples_skipped"] == 160
    assert set(made.skipped) <= {"unreadable shard"}
    if harm == "truncated":
        assert counts["samples_skipped"] >= 40 - 1
        assert {key[0] for keys in seen[-5:] for key in keys} == {"b"}


def test_a_slow_disk_only_slows(tmp_path, loader, monkeypatch):
    write_shard(tmp_path, good(count=12))
    settings = {"train": True, "batch_size": 4}
    quick = [next(stream).keys for stream in [loader(tmp_path, **settings).forever()] for _ in range(3)]
    read = ShardReader.read

    def slow(self, *place):
        time.sleep(0.02)
        return read(self, *place)

    monkeypatch.setattr(ShardReader, "read", slow)
    for workers in (0, 2):
        made = loader(tmp_path, workers=workers, **settings)
        assert [next(stream).keys for stream in [made.forever()] for _ in range(3)] == quick
        assert made.skipped == {}


def test_a_file_that_was_lost_for_a_moment_is_opened_again(tmp_path, monkeypatch):
    path = write_shard(tmp_path, good(count=1))
    reader = ShardReader([path])
    whole = reader.read(0, 0, 1024)
    gone = os.stat(path).st_ino
    os.rename(path, tmp_path / "old")
    path.write_bytes(whole)

    def stale(file, size, offset):
        if os.fstat(file).st_ino == gone:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(file, size, offset)

    pread = os.pread
    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(ShardError, match="Stale file handle"):
        reader.read(0, 0, 1024)
    assert reader.read(0, 0, 1024) == whole


def test_equal_texts_of_a_batch_are_tokenised_once(tmp_path, loader, tokenizer):
    asked = []

    def counting(texts, length):
        asked.append(list(texts))
        return tokenizer(texts, length)

    regions = [{"box": [0, 0, 5, 5], "text": text} for text in ("dog", "cat", "dog")]
    write_shard(tmp_path, [(f"{i}", jpeg(), record(captions=[f"text {i % 2}"], regions=regions)) for i in range(4)])
    (batch,) = loader(tmp_path, tokenizer=counting)
    assert sorted(map(sorted, asked)) == [["cat", "dog"], ["text 0", "text 1"]]
    (plain,) = loader(tmp_path)
    assert batch.text.equal(plain.text)
    assert batch.region_text.equal(plain.region_text)


def test_training_on_nothing_but_broken_images_stops(tmp_path, loader):
    write_shard(tmp_path, [(f"x{i}", jpeg()[:300], record()) for i in range(4)])
    with pytest.raises(InputError, match=r"100 samples in a row cannot be used; last .*000000\.tar: x"):
        next(loader(tmp_path, train=True).forever())


def test_an_evaluation_batch_without_any_good_sample_is_left_out(tmp_path, loader):
    write_shard(tmp_path, [(f"x{i}", b"", record()) for i in range(4)] + good(count=2))
    made = loader(tmp_path)
    assert [batch.keys for batch in made] == [["g0", "g1"]]


REGIONS = [
    ([2, 3, 9, 11], "fine", (2, 3, 9, 11), None),
    ([-5, 3, 9, 99.5], "clipped", (0, 3, 9, 16), None),
    ([20, 3, 30, 9], "outside", None, "bad region box"),
    ([16, 0, 20, 16], "touching", None, "bad region box"),
    ([5, 5, 5, 9], "empty", None, "bad region box"),
    ([9, 5, 5, 9], "reversed", None, "bad region box"),
    ([5, 5, 9], "short", None, "bad region box"),
    ([float("nan"), 0, 9, 9], "nan", None, "bad region box"),
    ([0, 0, float("inf"), 9], "infinite", (0, 0, 16, 9), None),
    ([0, 0, 10**400, 9], "huge", (0, 0, 16, 9), None),
    (["0", 0, 9, 9], "text", None, "bad region box"),
    ([True, 0, 9, 9], "truth", None, "bad region box"),
    (None, "none", None, "bad region box"),
    ([0, 0, 9, 9], " ", None, "region without text"),
    ([0, 0, 9, 9], None, None, "region without text"),
    ([0, 0, 9, 9], "\ud800", None, "region without text"),
]


@pytest.mark.parametrize(("box", "text", "kept", "problem"), REGIONS)
def test_regions_are_kept_clipped_or_dropped(box, text, kept, problem):
    parsed = parse_record(json.dumps(record(regions=[{"box": box, "text": text}])).encode())
    assert parsed.boxes == ([] if kept is None else [kept])
    assert parsed.phrases == ([] if kept is None else [text])
    assert [kind for kind, _ in parsed.problems] == ([] if problem is None else [problem])


def test_bad_regions_are_counted_and_the_sample_stays(tmp_path, loader):
    regions = [{"box": box, "text": text} for box, text, *_ in REGIONS if text != "\ud800"] + ["no object"]
    write_shard(tmp_path, [("a", jpeg(), record(regions=regions))])
    made = loader(tmp_path, max_regions=8)
    (batch,) = made
    assert batch.phrases == [["fine", "clipped", "infinite", "huge"]]
    assert batch.boxes[0, 1].tolist() == [0, 3 / 16, 9 / 16, 1]
    assert made.skipped == {"bad region box": 10, "region without text": 2}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_not_json_is_a_bad_record(data):
    with pytest.raises(RecordError) as caught:
        parse_record(data)
    assert caught.value.kind == "bad record"


def test_the_schema_file_and_the_validator_agree():
    import cllip_fast.data

    schema = json.loads((Path(cllip_fast.data.__file__).parent / "sample.schema.json").read_text())
    full = record(regions=[{"box": [0, 0, 5, 5], "text": "x"}])
    assert set(full) <= set(schema["properties"])
    for name in full:
        without = {key: value for key, value in full.items() if key != name}
        if name in schema["required"]:
            with pytest.raises(RecordError):
                parse_record(json.dumps(without).encode())
        else:
            assert parse_record(json.dumps(without).encode()).problems == []
    region = schema["properties"]["regions"]["items"]
    assert set(region["required"]) == set(full["regions"][0])
    for name in region["required"]:
        parsed = parse_record(
            json.dumps(record(regions=[{k: v for k, v in full["regions"][0].items() if k != name}])).encode()
        )
        assert len(parsed.problems) == 1


@pytest.mark.parametrize(
    "side", ["1e400", "1" + "0" * 400, "1" + "0" * 5000, "2147483648", "-1", "true", "[" * 900 + "]" * 900]
)
@pytest.mark.parametrize("crop", ["pad", "random"])
def test_sides_beyond_all_bounds_are_a_bad_record(tmp_path, loader, side, crop):
    text = f'{{"captions": ["a"], "width": {side}, "height": 16}}'.encode()
    files = [("x.jpg", jpeg()), ("x.json", text), ("y.jpg", jpeg()), ("y.json", json.dumps(record()).encode())]
    made = loader(raw_shard(tmp_path / "a.tar", files), crop=crop, train=True, batch_size=2)
    assert next(made.forever()).keys == ["y", "y"]
    assert made.skipped == {"bad record": 1}


def test_members_over_the_byte_limit_are_never_read(tmp_path, loader):
    files = [("x.jpg", jpeg()), ("x.json", b" " * (1 << 22) + b"{}"), ("y.jpg", jpeg())]
    made = loader(raw_shard(tmp_path / "a.tar", [*files, ("y.json", json.dumps(record()).encode())]))
    assert read_all(made) == ["y"]
    assert made.skipped == {"over the byte limit": 1}


def test_what_is_no_file_is_no_shard(tmp_path, loader):
    write_shard(tmp_path, good(count=2))
    os.mkfifo(tmp_path / "pipe.tar")  # opening it would wait for ever
    made = loader(tmp_path)
    assert read_all(made) == ["g0", "g1"]
    assert made.skipped == {"unreadable shard": 1}
