"""`shards check`: finds what training skips, names it as training does, and survives every file."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cllip_fast.data import create_loader, train_bpe
from cllip_fast.data.index import expand_shards
from cllip_fast.errors import InputError
from cllip_fast.shard_tools import check_shards, pool
from cllip_fast.shard_tools.schema import KEYWORDS, record_schema, violations
from tests.data.painted import jpeg, record
from tests.shard_tools.tars import REGIONS, good, raw_tar, run, sample


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of hardly any bytes that claims to be of this size."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    chunks = [(b"IHDR", size + b"\x08\x02\0\0\0"), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png_bomb() -> bytes:
    """A real PNG of 16 × 16 with 8 MB of text compressed to 8 kB."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    data = file.getvalue()
    return data[:33] + png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(8_000_000))) + data[33:]


def bad_regions() -> list[dict[str, object]]:
    boxes = [[20, 3, 30, 9], [5, 5, 5, 9], [5, 5, 9], "box", [float("nan"), 0, 1, 1]]
    return [{"box": box, "text": "lost"} for box in boxes] + [{"box": [0, 0, 9, 9], "text": " "}, *REGIONS]


# what is in the tar -> what training skips of it, in evaluation: once
CASES: dict[str, tuple[list[tuple[str, bytes]], dict[str, int]]] = {
    "good": (good(), {}),
    "truncated image": (sample("x", jpeg()[:300]), {"broken image": 1}),
    "no image data": (sample("x", b""), {"broken image": 1}),
    "other format": (sample("x", b"GIF89a" + bytes(90)), {"broken image": 1}),
    "other size": (sample("x", jpeg(20, 16)), {"size differs from record": 1}),
    "a bomb": (sample("x", png_claiming(60_000, 60_000), suffix="png"), {"broken image": 1}),
    "a huge record": (sample("x", width=10**9, height=10**9), {"too many pixels": 1}),
    "no captions": (sample("x", captions=[]), {"no caption": 1}),
    "blank captions": (sample("x", captions=[" ", 3]), {"no caption": 1}),
    "no size": (sample("x", width="16"), {"bad record": 1}),
    "not UTF-8": ([("x.jpg", jpeg()), ("x.json", b'{"captions": ["\xff"]}')], {"bad record": 1}),
    "deep JSON": ([("x.jpg", jpeg()), ("x.json", b"[" * 100_000)], {"bad record": 1}),
    "a list": ([("x.jpg", jpeg()), ("x.json", b"[1]")], {"bad record": 1}),
    "regions": (sample("x", regions=bad_regions()), {"bad region box": 5, "region without text": 1}),
    "names": ([*sample("../up"), *sample("/top"), *sample("a/../b")], {"unsafe name": 6}),
    "lone files": ([("a.jpg", jpeg()), ("b.json", b"{}")], {"missing record": 1, "missing image": 1}),
    "second image": ([*sample("x"), ("x.png", jpeg())], {"duplicate member": 1}),
}


def test_what_check_reports_is_what_training_skips(tmp_path):
    for case, (files, _) in CASES.items():
        raw_tar(tmp_path / f"{case}.tar", [*files, *sample(f"good beside {case}")])
    whole = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "compressed.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    raw_tar(tmp_path / "nothing.tar", [("readme.txt", b"hello")])
    with tarfile.open(tmp_path / "good.tar", "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    paths = expand_shards(tmp_path)
    report = check_shards(paths)
    expected = Counter({"unreadable shard": 3, "empty shard": 1, "not a regular file": 1})
    for _, kinds in CASES.values():
        expected.update(kinds)
    assert report.skipped == expected
    loader = create_loader(
        tmp_path,
        tokenizer=train_bpe(["a picture"], 300),
        batch_size=4,
        image_size=16,
        text_length=4,
        region_length=4,
        max_regions=4,
        train=False,
    )
    trained = [key for batch in loader for key in batch.keys]
    assert report.skipped == loader.skipped
    assert (report.usable, report.samples) == (len(trained), loader.samples)
    assert set(report.noted) == {"duplicate key"}


@pytest.mark.parametrize("name", list(CASES))
def test_findings_name_their_place(tmp_path, name):
    files, kinds = CASES[name]
    path = raw_tar(tmp_path / "a.tar", files)
    report = check_shards([path])
    assert set(kinds) <= set(report.counts)
    for kind in kinds:
        fault = report.places[kind][0]
        assert fault.shard == str(path)
        assert fault.key
        assert fault.detail


@pytest.mark.parametrize(
    ("kind", "size", "repeats"),
    [
        (tarfile.GNUTYPE_LONGNAME, 512, 5000),  # headers that nest deeper than Python does
        (tarfile.XHDTYPE, 1 << 60, 1),  # more than fits into memory
        (tarfile.GNUTYPE_LONGNAME, 1 << 62, 1),
        (tarfile.REGTYPE, 1 << 80, 1),  # more than fits into a file
        (tarfile.REGTYPE, -512, 1),  # back to the same header
    ],
)
def test_hostile_headers_make_a_shard_unreadable(tmp_path, kind, size, repeats):
    info = tarfile.TarInfo("x")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size + (1 << 95 if size > 0 else 1 << 96)).to_bytes(12, "big")  # base 256, two's complement
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes((bytes(header) + b"x" * 512) * repeats)
    raw_tar(tmp_path / "b.tar", good())
    report = check_shards(expand_shards(tmp_path))
    assert report.skipped == {"unreadable shard": 1}
    assert report.usable == 6


def test_any_number_of_workers_finds_the_same(tmp_path):
    for i in range(3):
        raw_tar(tmp_path / f"{i}.tar", [file for files, _ in CASES.values() for file in files] + good(f"p{i}", 20))
    paths = expand_shards(tmp_path)
    alone = check_shards(paths, keep_all=True)
    found = check_shards(paths, workers=2, keep_all=True)
    assert (found.counts, found.samples, found.usable) == (alone.counts, alone.samples, alone.usable)
    for kind, faults in alone.places.items():
        assert [fault[:3] for fault in found.places[kind]] == [fault[:3] for fault in faults]
    assert sum(map(len, alone.places.values())) == alone.counts.total()


def test_a_lost_caption_is_found_where_the_sample_stays(tmp_path):
    report = check_shards([raw_tar(tmp_path / "a.tar", sample("x", captions=["fine", " ", "\ud800", 7]))])
    assert report.skipped == {"caption without text": 3}
    assert report.usable == 1


def test_numbers_beyond_all_bounds_are_a_bad_record(tmp_path):
    regions = [{"box": [0, 0, 10**399, 9], "text": "x"}]
    files = sample("x", width=10**400, regions=regions)
    assert check_shards([raw_tar(tmp_path / "a.tar", files)]).skipped == {"bad record": 1}


def test_what_is_used_all_the_same_is_only_noted(tmp_path):
    regions = [{"box": [-1, 2, 9, 99.5], "text": "partly"}, {"box": [0, 0, 16, 16], "text": "whole", "score": 2}]
    one = raw_tar(tmp_path / "1.tar", sample("x", regions=regions, source=3, licence="CC BY 4.0"))
    two = raw_tar(tmp_path / "2.tar", [*sample("x"), *sample("y")])
    report = check_shards([one, two])
    assert report.noted == {"box partly outside": 1, "differs from schema": 2, "duplicate key": 1}
    details = [fault.detail for fault in report.places["differs from schema"]]
    assert details == ["regions[1].score: 2, expected at most 1", "source: a int, expected string"]
    assert report.places["duplicate key"][0][1:] == (str(two), "x", f"also in {one}")
    assert not report.skipped
    assert report.usable == 3
    assert run("check", one, two, "--workers", 0) == 0


def test_bombs_are_not_decoded(tmp_path):
    huge = sample("huge", png_claiming(60_000, 60_000), suffix="png", width=60_000, height=60_000)
    large = sample("large", jpeg(64, 64), width=64, height=64)
    text = sample("text", png_bomb(), suffix="png")
    path = raw_tar(tmp_path / "a.tar", [*huge, *large, *text, *good(count=1)])
    report = check_shards([path], max_pixels=64 * 64 - 1)
    assert report.skipped == {"too many pixels": 2, "broken image": 1}
    assert report.places["broken image"][0].key == "text"
    assert "64×64, expected at most 4095 pixels" in report.places["too many pixels"][1].detail
    assert check_shards([path], max_pixels=64 * 64).skipped["too many pixels"] == 1


def test_files_too_large_to_read_are_not_read(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # holes on disk: 300 MiB that take no room
        for name, data in sample("x"):
            info = tarfile.TarInfo(name)
            info.size = 300 << 20 if name == "x.jpg" else len(data)
            file.write(info.tobuf())
            start = file.tell()
            file.write(data)
            file.seek(start + -(-info.size // 512) * 512)
        file.write(bytes(1024))
    assert check_shards([path]).skipped == {"over the byte limit": 1, "empty shard": 1}


def test_a_crash_costs_one_sample(tmp_path, monkeypatch):
    honest = pool.examine

    def crashing(sample, reader, max_pixels):
        return os._exit(11) if sample.key.startswith("crash") else honest(sample, reader, max_pixels)

    monkeypatch.setattr(pool, "examine", crashing)
    monkeypatch.setattr(pool, "_BATCH", 3)
    path = raw_tar(tmp_path / "a.tar", [*good("a", 4), *sample("crash1"), *good("b", 20), *sample("crash2")])
    report = check_shards([path], workers=2)
    assert [fault.key for fault in report.places["broken image"]] == ["crash1", "crash2"]
    assert report.counts == {"broken image": 2}
    assert (report.samples, report.usable) == (26, 24)


def test_the_command_reports_and_fails(tmp_path, capsys):
    raw_tar(tmp_path / "a.tar", [*good(), *(file for i in range(9) for file in sample(f"x{i}\u00e9", b""))])
    found = tmp_path / "found.json"
    assert run("check", tmp_path, "--workers", 0, "--json", found) == 1
    text = capsys.readouterr().out
    assert "1 shards, 15 samples, 6 of them usable" in text
    assert "9 × broken image" in text
    assert text.count("a.tar: x") == 3, "the first few places"
    listed = json.loads(found.read_text())
    assert [place["key"] for place in listed["skipped"]["broken image"]["places"]] == [f"x{i}é" for i in range(9)]
    assert listed["usable"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "found.json"]


def test_strange_names_can_be_printed(tmp_path, capsys):
    path = raw_tar(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.tar")), sample("x", b""))
    assert run("check", path, "--workers", 0) == 1
    assert "\\xff" in capsys.readouterr().out.replace("\\udcff", "\\xff")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", -1], "workers is -1"),
        (["--max-pixels", 0], "max_pixels is 0"),
        (["--max-pixels", Image.MAX_IMAGE_PIXELS + 1], "Pillow's own limit"),
        (["--json", "none/found.json"], "none does not exist"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    raw_tar(tmp_path / "a.tar", good())
    with pytest.raises(InputError, match=message):
        run("check", tmp_path, *arguments)


# The schema


def test_the_schema_uses_only_keywords_that_are_understood():
    def keywords(schema):
        yield from schema
        for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            yield from keywords(inner)

    assert set(keywords(record_schema())) - KEYWORDS == {"$schema", "title", "description"}


@pytest.mark.parametrize(
    ("change", "places"),
    [
        ({}, []),
        ({"extra": 1}, []),
        ({"captions": []}, ["captions"]),
        ({"captions": ["a", " ", 3]}, ["captions[1]", "captions[2]"]),
        ({"width": 0, "height": True}, ["width", "height"]),
        ({"regions": [{"box": [1, 2, 3], "text": "x"}, {"box": [1, 2, 3, "4"]}, 5]},
         ["regions[0].box", "regions[1].text", "regions[1].box[3]", "regions[2]"]),
        ({"licence": None}, ["licence"]),
        ({"regions": [{"box": [0, 0, 9, 9], "text": "x", "score": score} for score in (0, 1, -0.1, 1.1, float("nan"))]},
         ["regions[2].score", "regions[3].score", "regions[4].score"]),
    ],
)  # fmt: skip
def test_departures_from_the_schema_are_placed(change, places):
    assert [place for place, _ in violations(record() | change, record_schema())] == places


def test_an_absent_field_departs_from_the_schema():
    value = record()
    del value["width"]
    assert list(violations(value, record_schema())) == [("width", "absent")]
