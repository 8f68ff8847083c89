"""Every converter on damaged annotations: one clear line that names the file, or shards in which all is usable."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllip_fast.convert import ConvertSummary, Source, write_shards
from cllip_fast.convert.cli import FORMATS
from cllip_fast.errors import InputError
from cllip_fast.shard_tools import check_shards
from tests.convert.written import paint, put
from tests.data.painted import jpeg
from tests.shard_tools.tars import raw_tar

NAMES = ("1.jpg", "2.jpg", "3.jpg")
VALUES = [None, True, 0, -1, 3, 10**400, 1e308, float("nan"), float("-inf"), "", " ", "x", "\ud800", "ü\n\x00"]
VALUES += [[], {}, [[]], [1, 2], "../../etc/passwd", "/etc/passwd", "1" * 5000, {"id": 1}]


def coco(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Options of the converter, and its annotation files."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 50, "license": 1} for i in (1, 2, 3)]
    boxes = [
        {"id": n, "image_id": n % 3 + 1, "category_id": 1 + n % 2, "bbox": [n, 1, 9.5, 8], "iscrowd": 0}
        for n in range(6)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    value = {"images": images, "annotations": boxes, "categories": categories, "licenses": [{"id": 1, "name": "CC0"}]}
    captions = {"annotations": [{"image_id": i, "caption": f"picture {i}"} for i in (1, 2, 3)]}
    files = {"instances": put(folder / "instances.json", value), "captions": put(folder / "captions.json", captions)}
    return files | {"images": folder / "images"}, files


def refcoco(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    options, _ = coco(folder)
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": n % 3 + 1, "split": "train", "sentences": [{"sent": f"dog {n}"}]}
        for n in range(6)
    ]
    files = {"refs": put(folder / "refs.json", refs), "instances": options["instances"]}
    return files | {"images": folder / "images"}, files


def refcoco_s(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    refs = [{"file_name": name, "normal_caption": "the dog", "solution": [1, 2, 30, 40]} for name in NAMES]
    files = {"refs": put(folder / "refs.json", refs)}
    return files | {"images": folder / "images"}, files


def visual_genome(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    region = {"x": 1, "y": 2, "width": 30, "height": 20, "phrase": "a dog"}
    value = [{"id": i, "regions": [region, region | {"x": i}]} for i in (1, 2, 3)]
    files = {"regions": put(folder / "regions.json", value)}
    return files | {"images": folder / "images"}, files


def grit(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    span = [0, 5, 0.1, 0.2, 0.5, 0.8, 0.7]
    entry = {"caption": "a dog and a cat", "url": "http://x", "noun_chunks": [span], "ref_exps": [span]}
    return {"shards": folder / "grit"}, {"entry": put(folder / "entry.json", entry)}


def flickr30k(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    box = "<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"
    size = "<size><width>100</width><height>50</height></size>"
    files = {}
    for i in (1, 2, 3):
        text = f"[/EN#{i}/people A man] runs .\n[/EN#{i}/people He] runs .\n"
        files[f"text {i}"] = put(folder / "Sentences" / f"{i}.txt", text)
        xml = f"<annotation>{size}<object><name>{i}</name>{box}</object></annotation>"
        files[f"boxes {i}"] = put(folder / "Annotations" / f"{i}.xml", xml)
    options = {"sentences": folder / "Sentences", "annotations": folder / "Annotations", "images": folder / "images"}
    return options, files


def voc(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    box = "<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"
    size = "<size><width>100</width><height>50</height></size>"
    files = {}
    for i in (1, 2, 3):
        xml = f"<annotation><filename>{i}.jpg</filename>{size}<object><name>dog</name>{box}</object></annotation>"
        files[str(i)] = put(folder / "Annotations" / f"{i}.xml", xml)
    return {"annotations": folder / "Annotations", "images": folder / "images"}, files


def yolo(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    files = {str(i): put(folder / "labels" / f"{i}.txt", "0 0.5 0.5 0.2 0.3\n1 0.2 0.2 0.1 0.1\n") for i in (1, 2, 3)}
    files["names"] = put(folder / "names.txt", "dog\ncat\n")
    return {"images": folder / "images", "labels": folder / "labels", "names": files["names"]}, files


def open_images(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    rows = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf"]
    rows += [f"{i},xclick,/m/{n},1,0.1,0.5,0.2,0.6,0" for i in (1, 2, 3) for n in (1, 2)]
    files = {
        "boxes": put(folder / "boxes.csv", "\n".join(rows) + "\n"),
        "names": put(folder / "names.csv", "/m/1,dog\n/m/2,cat\n"),
    }
    return files | {"images": folder / "images"}, files


MAKERS: dict[str, Callable[[Path], tuple[dict[str, Any], dict[str, Path]]]] = {
    "coco": coco,
    "refcoco": refcoco,
    "refcoco S": refcoco_s,
    "visual-genome": visual_genome,
    "grit": grit,
    "flickr30k": flickr30k,
    "voc": voc,
    "yolo": yolo,
    "open-images": open_images,
}


def read(name: str, folder: Path, options: dict[str, Any]) -> Source:
    if name == "grit":  # the tar is made of the annotation file, damaged or not
        record = (folder / "entry.json").read_bytes()
        raw_tar(folder / "grit" / "0.tar", [("1.jpg", jpeg(100, 50)), ("1.json", record)])
    return FORMATS[name.split()[0]].read(**options)


def convert(name: str, folder: Path, options: dict[str, Any], out: Path) -> ConvertSummary | str:
    """The summary; or the one line that says why not, after which no folder is there."""
    try:
        summary = write_shards(read(name, folder, options), out, val_share=0.0)
        refusal = ""
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert not out.exists()
        assert "\n" not in refusal
        assert len(refusal) < 600 + 2 * len(str(folder)), "one line that can be read"
        assert str(folder) in refusal or "no image to convert" in refusal or "expected one of" in refusal
        return refusal
    report = check_shards(sorted((out / "train").glob("*.tar")))
    assert not report.skipped, report.as_text()
    assert not report.noted, report.as_text()
    assert report.usable == summary.written["train images"] > 0
    return summary


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The same value with one thing in it deleted or replaced."""
    places = []

    def walk(node: Any) -> None:
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(inner)

    root = [value]
    walk(root)
    node, key = rng.choice(places)
    if rng.random() < 0.25 and node is not root:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return root[0]


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    how = rng.randrange(6)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    if how == 2:
        return (
            data[:at]
            + rng.choice([b"\0", b"-", b"1e400", b"9" * 5000, b"nan", b"<", b"]", b"\xff", b'"', b"&x;"])
            + data[at:]
        )
    if how == 3:
        return data[:at] + data[at + rng.randrange(1, 20) :]
    if how == 4:
        lines = data.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    return data.replace(b"1", rng.choice([b"", b"x", b"-5", b"7777777777777777"]), 1)


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_annotations_give_one_line_or_usable_shards(tmp_path, name):
    folder = tmp_path / "set"
    paint(folder / "images", *NAMES)
    options, files = MAKERS[name](folder)
    originals = {path: path.read_bytes() for path in files.values()}
    outcomes = []
    for seed in range(20):
        rng = random.Random(f"{name}/{seed}")
        path = rng.choice(list(originals))
        if path.suffix == ".json" and rng.random() < 0.8:
            damaged = json.dumps(mutate_json(json.loads(originals[path]), rng)).encode()
        else:
            damaged = mutate_text(originals[path], rng)
        path.write_bytes(damaged)
        try:
            outcomes.append(convert(name, folder, options, tmp_path / f"out{seed}"))
        except Exception as error:
            error.add_note(f"seed {seed}: {path.name}: {damaged[:400]!r}")
            raise
        path.write_bytes(originals[path])
    assert any(isinstance(outcome, ConvertSummary) for outcome in outcomes)
    assert any(isinstance(outcome, str) for outcome in outcomes)


@pytest.mark.parametrize("name", MAKERS)
def test_a_byte_order_mark_and_dos_line_ends_change_nothing(tmp_path, name):
    folder = tmp_path / "set"
    paint(folder / "images", *NAMES)
    options, files = MAKERS[name](folder)
    plain = convert(name, folder, options, tmp_path / "plain")
    for path in files.values():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert convert(name, folder, options, tmp_path / "dos") == plain
    shards = [(tmp_path / out / "train" / "000000.tar").read_bytes() for out in ("plain", "dos")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("name", MAKERS)
def test_empty_files_are_named(tmp_path, name):
    folder = tmp_path / "set"
    paint(folder / "images", *NAMES)
    options, files = MAKERS[name](folder)
    for i, path in enumerate(files.values()):
        whole = path.read_bytes()
        path.write_bytes(b"")
        outcome = convert(name, folder, options, tmp_path / f"out{i}")
        if isinstance(outcome, ConvertSummary):  # an image without boxes, or without sentences
            assert outcome.skipped
        path.write_bytes(whole)
