"""Visual Genome's region descriptions."""

import pytest

from cllip_fast.convert.visual_genome import read
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, paint, put, regions


def region(x, y, width, height, phrase, number=1382):
    return {"region_id": number, "image_id": 1, "x": x, "y": y, "width": width, "height": height, "phrase": phrase}


def test_regions_from_both_folders(tmp_path):
    images = paint(tmp_path / "images", "VG_100K/2.jpg", "VG_100K_2/1.jpg", "3.jpg")
    phrases = [region(0, 0, 10, 10, f"thing {number}") for number in range(9)]
    file = [
        {"id": 1, "regions": [region(42, 5, 8, 13, "the clock is green in colour "), region(90, 0, 182, 10, "shade")]},
        {"id": 2, "regions": [region(1, 2, 3, 4, "a"), region(1, 2, 0, 4, "b"), region(-3, 2, 3, 4, "c")]},
        {"id": 3, "regions": phrases},
        {"id": 4, "regions": [region(1, 1, 1, 1, "x")]},
        {"id": 5, "regions": []},
    ]
    source = read(put(tmp_path / "region_descriptions.json", file), images)
    summary, records = convert(source, tmp_path / "out")
    assert regions(records["1"]) == [("the clock is green in colour", 42, 5, 50, 18), ("shade", 90, 0, 100, 10)]
    assert regions(records["2"]) == [("a", 1, 2, 4, 6)]
    assert records["1"]["captions"] == ["the clock is green in colour , shade"]
    assert records["3"]["captions"] == [", ".join(f"thing {number}" for number in range(8))]
    assert summary.skipped == {
        "boxes without area": 1,
        "boxes outside the image": 1,
        "images without a file": 1,
        "images without a caption": 1,
    }


def test_broken_entries_are_named(tmp_path):
    images = paint(tmp_path / "images", "1.jpg")
    good = region(1, 2, 3, 4, "a")
    for content, message in (
        ({"id": 1}, r"r\.json: entry is \{'id': 1\}, expected a list"),
        ([{"id": 1}], r"r\.json: entry\[0\] has regions None, expected a list"),
        ([{"id": 1, "regions": [good, good | {"x": None}]}], r"entry\[0\]\.regions\[1\] has x None, expected a number"),
        ([{"id": 1, "regions": [good | {"phrase": 5}]}], r"regions\[0\] has phrase 5, expected a text"),
    ):
        with pytest.raises(InputError, match=message):
            drain(read, put(tmp_path / "r.json", content), images)
