"""YOLO's label files."""

import pytest

from cllip_fast.convert.yolo import read
from cllip_fast.data import read_dataset_info
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, paint, put, regions


def make(tmp_path, text="0 0.5 0.5 0.2 0.4\n\n1 0.1 0.9 0.4 0.4 0.75\n", names="person\ntraffic light\n\n"):
    images = paint(tmp_path / "images", "train/a.jpg", "train/b.rf.1.jpg", "c.jpg")
    put(tmp_path / "labels" / "train" / "a.txt", text)
    put(tmp_path / "labels" / "train" / "b.rf.1.txt", "")
    return images, tmp_path / "labels", put(tmp_path / "coco.names", names)


def test_lines_become_regions(tmp_path):
    arguments = make(tmp_path)
    put(arguments[0] / "notes.txt", "no image")
    summary, records = convert(read(*arguments), tmp_path / "out")
    assert regions(records["train/a"]) == [("person", 40, 15, 60, 35), ("traffic light", 0, 35, 30, 50, 0.75)]
    assert records["train/a"]["captions"] == ["person, traffic light"]
    assert summary.skipped == {"images without a label file": 1, "images without a caption": 1}
    assert summary.changed == {"boxes clipped to the image": 1}
    assert read_dataset_info(tmp_path / "out").classes == ["person", "traffic light"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2", r"a\.txt: line 1 has 4 numbers"),
        ("0 .5 .5 .2 .4\n0 0.1 0.1 0.2 0.1 0.2 0.2", r"a\.txt: line 2 has 7 numbers"),
        ("2 0.5 0.5 0.2 0.4", r"a\.txt: line 1 has class '2', expected 0 to 1"),
        ("-1 0.5 0.5 0.2 0.4", "line 1 has class '-1'"),
        ("person 0.5 0.5 0.2 0.4", "line 1 has class 'person'"),
        ("0 0.5 nan 0.2 0.4", "line 1 is 'nan', expected a number"),
        ("0 0.5 0.5 0.2 0.4 7", r"line 1 has score 7\.0, expected 0 to 1"),
    ],
)
def test_broken_lines_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        drain(read, *make(tmp_path, text))


def test_a_gap_in_the_names_would_shift_the_classes(tmp_path):
    with pytest.raises(InputError, match=r"coco\.names: line 2 is empty"):
        read(*make(tmp_path, names="person\n\ntraffic light\n"))
