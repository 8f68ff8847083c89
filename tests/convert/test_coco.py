"""COCO files to shards, on small made-up files and on real ones, through the command line."""

import re

import pytest

from cllip_fast.cli import main
from cllip_fast.convert import coco as format_coco
from cllip_fast.convert.coco import read
from cllip_fast.data import create_loader, load_tokenizer, read_dataset_info
from cllip_fast.errors import InputError
from tests.convert.written import convert, paint, put, regions


def image(number, **changes):
    return {"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 50} | changes


def box(number, bbox, category=7, **changes):
    return {"image_id": number, "category_id": category, "bbox": bbox, "iscrowd": 0} | changes


@pytest.fixture
def files(tmp_path):
    """A function that writes COCO files with the given changes and returns `read`'s arguments."""
    folder = paint(tmp_path / "images", *(f"{number}.jpg" for number in range(1, 7)))
    (folder / "4.jpg").write_bytes(b"no image")
    paint(tmp_path, "secret.jpg")
    instances = {
        "images": [
            image(2),
            image(1, flickr_url="http://example.org/1", license=4),
            image(3, file_name="absent.jpg"),
            image(4),
            image(5, width=20),
            image(6, file_name="../secret.jpg"),
            image(9),
        ],
        "annotations": [
            box(1, [2, 3, 5, 6.5], segmentation=[[2, 3, 7, 3, 7, 9.5]]),
            box(1, [90, 10, 50, 2], 8),
            box(1, [0, 0, 9, 9], iscrowd=1),
            box(2, [3, 3, 0, 5]),
            box(2, [130, 3, 5, 5]),
            box(2, [0, 0, 5, 5], 99),
            box(77, [0, 0, 5, 5]),
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "traffic light"}],
        "licenses": [{"id": 4, "name": "Attribution License"}],
    }
    captions = {"annotations": [{"image_id": n, "caption": f" a cat {n}\n"} for n in range(1, 7)]}
    captions["annotations"].append({"image_id": 9, "caption": " "})

    def write(**changes):
        put(tmp_path / "captions.json", captions)
        return put(tmp_path / "instances.json", instances | changes), tmp_path / "captions.json", folder

    return write


def test_records_hold_boxes_classes_captions_and_credit(files, tmp_path):
    summary, records = convert(read(*files()), tmp_path / "out")
    assert summary.skipped == {
        "crowd boxes": 1,
        "boxes without area": 1,
        "boxes outside the image": 1,
        "boxes of an unknown category": 1,
        "boxes of an unknown image": 1,
        "images without a file": 1,
        "files that are no image": 1,
        "images of another size than recorded": 1,
        "images with a path outside the folder": 1,
        "images without a caption": 1,
    }
    assert list(records) == ["000000000001", "000000000002"]
    one, two = records.values()
    assert regions(one) == [("cat", 2, 3, 7, 9.5), ("traffic light", 90, 10, 100, 12)]
    assert (one["captions"], one["source"], one["licence"]) == (
        ["a cat 1"],
        "http://example.org/1",
        "Attribution License",
    )
    assert two == {"captions": ["a cat 2"], "regions": [], "width": 100, "height": 50}
    info = read_dataset_info(tmp_path / "out" / "train")
    assert (info.name, info.classes, info.attributes) == ("coco", ["cat", "traffic light"], None)


def test_bad_files_are_refused_with_file_and_entry(files, tmp_path):
    for changes, message in (
        ({"images": None}, r"instances\.json lacks the list 'images'"),
        ({"images": [{"id": 1}]}, r"instances\.json: images\[0\] has file_name None, expected a text"),
        ({"images": [image(1), 7]}, r"images\[1\] is 7, expected an object"),
        ({"annotations": [box(1, [1, 2, 3])]}, r"annotations\[0\]\.bbox is \[1, 2, 3\], expected 4 numbers"),
        ({"annotations": [box(1, [1, 2, 3, float("nan")])]}, r"bbox is \[1, 2, 3, nan\], expected 4 numbers"),
        ({"annotations": [box(1, [1, 2, 3, 10**400])]}, r"annotations\[0\]\.bbox is"),
        ({"annotations": [box(1, "1234")]}, r"has bbox '1234', expected a list"),
        ({"licenses": [5]}, r"licenses\[0\] is 5, expected an object"),
        ({"annotations": [box(True, [1, 2, 3, 4])]}, r"has image_id True, expected an integer"),
    ):
        with pytest.raises(InputError, match=message):
            read(*files(**changes))
    instances, captions, images = files()
    with pytest.raises(InputError, match=r"images folder .*none does not exist"):
        read(instances, captions, tmp_path / "none")
    for text, message in (("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "lacks the list 'annotations'")):
        captions.write_text(text)
        with pytest.raises(InputError, match=rf"captions\.json {message}"):
            read(instances, captions, images)
    captions.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"captions\.json is no UTF-8 text"):
        read(instances, captions, images)


def test_the_help_shows_the_layout(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "coco", "--help"])
    assert "Crowd boxes are skipped" in " ".join(capsys.readouterr().out.split())
    assert format_coco.__doc__.startswith("COCO and LVIS: ")


def test_real_coco_files(coco, tmp_path, capsys):
    arguments = ["--instances", str(coco / "annotations" / "instances.json")]
    arguments += ["--captions", str(coco / "annotations" / "captions.json"), "--images", str(coco / "images")]
    assert main(["convert", "coco", *arguments, "--out", str(tmp_path / "c"), "--shard-size", "100"]) == 0
    said = capsys.readouterr().out
    val, train = (int(re.search(rf"(\d+) {split} images", said)[1]) for split in ("val", "train"))
    assert val + train == 437
    assert 20 <= val <= 70
    assert "53 images without a caption" in said
    assert "1 boxes without area" in said, "one box of the real file has no height"
    info = read_dataset_info(tmp_path / "c")
    assert len(info.classes) == 80
    assert len(list((tmp_path / "c" / "train").glob("*.tar"))) == -(-train // 100)
    loader = create_loader(
        tmp_path / "c" / "val",
        tokenizer=load_tokenizer(info.tokenizer_path),
        batch_size=16,
        image_size=32,
        text_length=16,
        region_length=8,
        max_regions=4,
        train=False,
    )
    batches = list(loader)
    assert sum(len(batch) for batch in batches) == val
    assert loader.skipped == {}
    assert {phrase for batch in batches for row in batch.phrases for phrase in row} <= set(info.classes)


LVIS = {
    "info": {"description": "LVIS v1"},
    "licenses": [{"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
    "images": [
        {
            "id": number,
            "coco_url": f"http://images.cocodataset.org/{split}2017/{number:012d}.jpg",
            "flickr_url": f"http://farm1.staticflickr.com/{number}_z.jpg",
            "width": 100,
            "height": 50,
            "license": 4,
            "date_captured": "2013-11-15 13:55:22",
            "not_exhaustive_category_ids": [2],
            "neg_category_ids": [3, 1],
        }
        for number, split in ((397133, "val"), (139, "train"), (5, "train"))
    ],
    "annotations": [
        {"id": 1, "image_id": 397133, "category_id": 1, "bbox": [1.5, 2, 10, 20.25], "area": 200.0,
         "segmentation": [[1.5, 2, 11.5, 2, 11.5, 22.25]]},
        {"id": 2, "image_id": 397133, "category_id": 2, "bbox": [0, 0, 100, 50], "area": 5000.0, "segmentation": []},
        {"id": 3, "image_id": 139, "category_id": 3, "bbox": [5, 5, 9, 9], "area": 81.0, "segmentation": []},
    ],
    "categories": [
        {"id": n, "name": name, "synonyms": [name, "x"], "synset": f"{name}.n.01", "def": "it", "frequency": f,
         "image_count": 5, "instance_count": 9}
        for n, name, f in ((1, "bow_(weapon)", "r"), (2, "bow_(decorative_ribbons)", "c"), (3, "aerosol_can", "f"))
    ],
}  # fmt: skip


@pytest.mark.parametrize("folders", [True, False])
def test_lvis(tmp_path, folders):
    places = {"val2017": "000000397133.jpg", "train2017": "000000000139.jpg"}
    names = [f"{folder}/{name}" if folders else name for folder, name in places.items()]
    images = paint(tmp_path / "images", *names)
    instances = put(tmp_path / "lvis_v1_val.json", LVIS)
    summary, records = convert(read(instances, None, images), tmp_path / "out")
    assert summary.skipped == {"images without a caption": 1}, "an image without boxes has nothing to be captioned by"
    one, two = records["000000000139"], records["000000397133"]
    assert regions(one) == [("aerosol can", 5, 5, 14, 14)]
    assert regions(two) == [("bow (weapon)", 1.5, 2, 11.5, 22.25), ("bow (decorative ribbons)", 0, 0, 100, 50)]
    assert two["captions"] == ["bow (weapon), bow (decorative ribbons)"]
    assert two["licence"] == "Attribution License"
    assert read_dataset_info(tmp_path / "out").classes == ["bow (weapon)", "bow (decorative ribbons)", "aerosol can"]

    captions = {"annotations": [{"image_id": 139, "caption": "a can"}]}
    _, records = convert(read(instances, put(tmp_path / "c.json", captions), images), tmp_path / "captioned")
    assert {key: record["captions"] for key, record in records.items()} == {"000000000139": ["a can"]}
