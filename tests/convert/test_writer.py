"""The writer: what it copies, clips, skips, refuses and counts, whatever the format."""

import io
import json
import re
from collections import Counter

import pytest
from PIL import Image

from cllip_fast.convert import Region, Sample, Source, write_shards
from cllip_fast.convert.schema import find_violation
from cllip_fast.errors import InputError
from tests.convert.written import convert, paint, read_members, regions
from tests.data.painted import jpeg


def sample(key="a", image=None, boxes=(), **changes):
    image = jpeg(100, 50) if image is None else image
    return Sample(key, image, ["a picture"], [Region(tuple(box), text) for box, text in boxes], **changes)


def source(*samples, **changes):
    return Source("made", samples, **changes)


def png(mode, colour):
    file = io.BytesIO()
    Image.new(mode, (20, 10), colour).save(file, "PNG")
    return file.getvalue()


def test_boxes_are_clipped_scaled_or_counted_out(tmp_path):
    boxes = [
        ((-5, 10, 20.004, 60), "cut\n  to size"),
        ((0, 0, 100, 50), "whole"),
        ((0, 0, 100, 50), "whole"),
        ((7, 7, 7, 9), "flat"),
        ((9, 7, 8, 9), "turned"),
        ((float("nan"), 0, 5, 5), "not a number"),
        ((100, 0, 120, 5), "beside"),
        ((0, 49.998, 5, 55), "a hair"),
        ((1, 1, 2, 2), " \n"),
    ]
    share = sample("b", boxes=[((0.1, 0.2, 0.5, 1.00000001), "share")], relative=True)
    summary, records = convert(source(sample(boxes=boxes), share), tmp_path / "out")
    assert regions(records["a"]) == [("cut to size", 0, 10, 20, 50), ("whole", 0, 0, 100, 50)]
    assert regions(records["b"]) == [("share", 10, 10, 50, 50)]
    assert summary.skipped == {
        "regions given twice": 1,
        "boxes without area": 3,
        "boxes outside the image": 2,
        "regions without a text": 1,
    }
    assert summary.changed == {"boxes clipped to the image": 1}
    assert summary.written == {"val images": 0, "train images": 2, "regions": 3, "captions": 2}
    assert "wrote" not in str(summary)
    assert str(summary).startswith("written 0 val images, 2 train images, 3 regions")


def test_jpeg_bytes_are_copied_and_other_images_re_encoded(tmp_path):
    whole = jpeg(30, 20, (1, 2, 9, 9))
    samples = [sample("jpg", whole), sample("png", png("RGB", "red")), sample("see-through", png("RGBA", (0, 0, 0, 0)))]
    summary, records = convert(source(*samples, sample("junk", b"GIF89a")), tmp_path / "out")
    members = read_members(tmp_path / "out" / "train" / "000000.tar")
    assert members["jpg.jpg"] == whole
    for key, colour in (("png", (254, 0, 0)), ("see-through", (255, 255, 255))):
        with Image.open(io.BytesIO(members[f"{key}.jpg"])) as image:
            assert (image.format, image.size, image.getpixel((5, 5))) == ("JPEG", (20, 10), colour)
        assert (records[key]["width"], records[key]["height"]) == (20, 10)
    assert summary.changed == {"images re-encoded as JPEG": 2}
    assert summary.skipped == {"files that are no image": 1}


def test_images_come_from_their_folder_only(tmp_path):
    folder = paint(tmp_path / "images", "in/a.jpg")
    paint(tmp_path, "secret.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["in/a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "absent.jpg", "in", "zero\0"]
    samples = [sample(f"k{number}", name) for number, name in enumerate(names)]
    summary, records = convert(source(*samples, images=folder), tmp_path / "out")
    assert list(records) == ["k0"]
    assert summary.skipped == {"images with a path outside the folder": 3, "images without a file": 3}


def test_keys_are_safe_and_distinct(tmp_path):
    keys = ["plain/key-1", "../../up", "a.b", "a_b", "/etc/passwd", "é" * 200, "x" * 200, "plain/key-1"]
    summary, records = convert(source(*(sample(key) for key in keys)), tmp_path / "out")
    assert summary.skipped == {"images with a key that came before": 1}
    assert len(records) == 7
    assert {"plain/key-1", "a_b"} < set(records)
    for key in records:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_/-]{,80}", key)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_a_sample_stays_on_its_side_and_bytes_repeat(tmp_path):
    keys = [f"{number:05d}" for number in range(200)]
    sides = []
    for name, chosen in (("all", keys), ("again", keys), ("half", keys[::2])):
        write_shards(source(*map(sample, chosen)), tmp_path / name, val_share=0.25, shard_size=50)
        sides.append(set(read_members(tmp_path / name / "val" / "000000.tar")))
    assert sides[2] < sides[0]
    assert 30 <= len(sides[0]) / 2 <= 70  # 50 expected, of a binomial with a standard deviation of 6
    files = [path.relative_to(tmp_path / "all") for path in (tmp_path / "all").rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert all((tmp_path / "all" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_facts_are_kept_and_checked(tmp_path):
    samples = [
        sample("credit", size=(100, 50), source="http://example.org", licence="CC BY"),
        sample("size", size=(50, 100)),
        Sample("silent", jpeg(), [" ", "\ud800"], []),
        Sample("half", jpeg(), ["half a \ud83d pair"], [Region((0, 0, 1, 1), "x", 0.123456)]),
    ]
    made = source(*samples, classes=["cat", " cat ", "dog"], skipped=Counter({"crowd boxes": 3}))
    summary, records = convert(made, tmp_path / "out")
    assert records["credit"] == {
        "captions": ["a picture"],
        "regions": [],
        "width": 100,
        "height": 50,
        "source": "http://example.org",
        "licence": "CC BY",
    }
    assert records["half"]["captions"] == ["half a pair"]
    assert regions(records["half"]) == [("x", 0, 0, 1, 1, 0.1235)]
    assert summary.skipped == {
        "crowd boxes": 3,
        "images of another size than recorded": 1,
        "images without a caption": 1,
    }
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info == {
        "name": "made",
        "splits": {"val": 0, "train": 2},
        "licences": {"CC BY": 1, "unknown": 1},
        "classes": ["cat", "dog"],
        "attributes": None,
    }


def test_what_is_refused_leaves_nothing(tmp_path):
    scored = Sample("a", jpeg(), ["x"], [Region((0, 0, 1, 1), "x", 1.5)])
    for made, options, message in (
        (source(), {}, "no image to convert; skipped: {}"),
        (source(sample(image=b"junk")), {}, "no image to convert; skipped: {'files that are no image': 1}"),
        (source(scored), {}, r"sample 'a' does not fit sample\.schema\.json: record\.regions\[0\]\.score is 1\.5"),
        (source(sample()), {"val_share": 1}, "val_share is 1"),
        (source(sample()), {"shard_size": 0}, "shard_size is 0"),
    ):
        with pytest.raises(InputError, match=message):
            write_shards(made, tmp_path / "out", **options)
        assert not [path for path in tmp_path.iterdir() if path.name != ".out.lock"]


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        ({}, None),
        ({"extra": object()}, None),
        ({"captions": []}, "record.captions has 0 items"),
        ({"captions": [" "]}, "record.captions[0] is ' '"),
        ({"width": 0}, "record.width is 0"),
        ({"width": True}, "record.width is True, expected type integer"),
        ({"height": 1.5}, "record.height is 1.5, expected type integer"),
        ({"regions": [{"text": "x"}]}, "record.regions[0] lacks 'box'"),
        ({"regions": [{"text": "x", "box": [1, 2, 3]}]}, "record.regions[0].box has 3 items"),
        ({"regions": [{"text": "x", "box": [1, 2, 3, "4"]}]}, "record.regions[0].box[3] is '4'"),
        ({"licence": 4}, "record.licence is 4, expected type string"),
    ],
)
def test_the_schema_is_what_records_are_checked_by(changes, violation):
    found = find_violation({"captions": ["x"], "width": 1, "height": 1} | changes)
    assert found is None if violation is None else found.startswith(violation)
