"""COCO files to shards, on small made-up files and on real ones, through the command line."""

import json
import re

import pytest

from cllip_fast.cli import main
from cllip_fast.data import load_tokenizer, read_dataset_info
from cllip_fast.data.coco import convert_coco
from cllip_fast.errors import InputError
from tests.data.painted import jpeg


def image(number, **changes):
    return {"id": number, "file_name": f"{number}.jpg", "width": 16, "height": 16} | changes


def box(number, bbox, category=7, **changes):
    return {"image_id": number, "category_id": category, "bbox": bbox, "iscrowd": 0} | changes


@pytest.fixture
def files(tmp_path):
    """A function that writes COCO files with the given changes and returns `convert_coco`'s first arguments."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 7):
        (folder / f"{number}.jpg").write_bytes(jpeg())
    (folder / "4.jpg").write_bytes(b"no image")
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    instances = {
        "images": [
            image(1, flickr_url="http://example.org/1", license=4),
            image(2),
            image(3, file_name="absent.jpg"),
            image(4),
            image(5, width=20),
            image(6, file_name="../secret.jpg"),
            image(9),
        ],
        "annotations": [
            box(1, [2, 3, 5, 6.5]),
            box(1, [10, 10, 50, 2], 8),
            box(1, [0, 0, 9, 9], iscrowd=1),
            box(2, [3, 3, 0, 5]),
            box(2, [30, 3, 5, 5]),
            box(2, [0, 0, 5, 5], 99),
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "traffic light"}],
        "licenses": [{"id": 4, "name": "Attribution License"}],
    }
    captions = {"annotations": [{"image_id": n, "caption": f" a cat {n}\n"} for n in range(1, 7)]}
    captions["annotations"].append({"image_id": 9, "caption": " "})

    def write(**changes):
        paths = tmp_path / "instances.json", tmp_path / "captions.json"
        paths[0].write_text(json.dumps(instances | changes))
        paths[1].write_text(json.dumps(captions))
        return *paths, folder

    return write


def test_records_hold_boxes_classes_captions_and_credit(files, tmp_path, loader):
    summary = convert_coco(*files(), tmp_path / "out", val_share=0)
    assert dict(summary.skipped) == {
        "crowd boxes": 1,
        "boxes without area": 2,
        "boxes of an unknown category": 1,
        "images without a file": 1,
        "files that are no JPEG": 1,
        "images of another size than recorded": 1,
        "images with a path outside the folder": 1,
        "images without a caption": 1,
    }
    assert dict(summary.written) == {"val images": 0, "train images": 2, "regions": 2, "captions": 2}
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    made = loader(tmp_path / "out" / "train", tokenizer=tokenizer, image_size=16)
    (batch,) = made
    assert made.skipped == {}
    assert batch.keys == ["000000000001", "000000000002"]
    assert batch.captions == [["a cat 1"], ["a cat 2"]]
    assert batch.phrases == [["cat", "traffic light"], []]
    assert (batch.boxes[0, :2] * 16).tolist() == [[2, 3, 7, 9.5], [10, 10, 16, 12]]
    info = read_dataset_info(tmp_path / "out" / "train")
    assert (info.name, info.classes, info.attributes) == ("coco", ["cat", "traffic light"], None)
    text = (tmp_path / "out" / "train" / "000000.tar").read_bytes()
    assert b'"source":"http://example.org/1","licence":"Attribution License"' in text


def test_bad_files_are_refused_and_leave_nothing(files, tmp_path):
    out = tmp_path / "out"
    for changes, message in (
        ({"images": None}, "lacks the list 'images'"),
        ({"images": [{"id": 1}]}, "an entry of 'images' has no str 'file_name'"),
        ({"annotations": [box(1, [1, 2, 3])]}, r"bbox \[1, 2, 3\], expected x, y, width, height"),
        ({"annotations": [box(1, "1234")]}, "has no list 'bbox'"),
        ({"images": [image(9)]}, "no image to convert"),
    ):
        with pytest.raises(InputError, match=message):
            convert_coco(*files(**changes), out)
        assert not out.exists()
    instances, captions, images = files()
    with pytest.raises(InputError, match=r"images folder .*none does not exist"):
        convert_coco(instances, captions, tmp_path / "none", out)
    with pytest.raises(InputError, match="val_share is 1"):
        convert_coco(instances, captions, images, out, val_share=1)
    with pytest.raises(InputError, match="shard_size is 0"):
        convert_coco(instances, captions, images, out, shard_size=0)
    captions.write_text("{")
    with pytest.raises(InputError, match=r"captions\.json is not JSON"):
        convert_coco(instances, captions, images, out)


def test_the_command_line_reports_errors_in_one_line(tmp_path, capsys):
    arguments = ["convert", "coco", "--instances", "x.json", "--captions", "y.json", "--images", str(tmp_path)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "cllip-fast: x.json cannot be read: No such file or directory\n"
    assert main(["scenes", "--out", str(tmp_path / "s"), "--train", "0"]) == 2
    assert "train is 0" in capsys.readouterr().err


def test_scenes_from_the_command_line(tmp_path, capsys):
    counts = ["--train", "3", "--val", "2", "--unseen", "1", "--processes", "1"]
    assert main(["scenes", "--out", str(tmp_path / "s"), *counts]) == 0
    assert "3 train, 2 val, 1 unseen scenes" in capsys.readouterr().out
    assert (tmp_path / "s" / "unseen" / "000000.tar").is_file()


def test_real_coco_files(coco, tmp_path, capsys, loader):
    arguments = ["--instances", str(coco / "annotations" / "instances.json")]
    arguments += ["--captions", str(coco / "annotations" / "captions.json"), "--images", str(coco / "images")]
    assert main(["convert", "coco", *arguments, "--out", str(tmp_path / "c"), "--shard-size", "100"]) == 0
    said = capsys.readouterr().out
    assert "44 val images" in said
    assert "393 train images" in said
    assert "53 images without a caption" in said
    assert re.search(r"[1-9]\d* boxes without area", said), "one box of the real file has no height"
    info = read_dataset_info(tmp_path / "c")
    assert len(info.classes) == 80
    tokenizer = load_tokenizer(info.tokenizer_path)
    made = loader(tmp_path / "c" / "val", tokenizer=tokenizer, batch_size=16, max_regions=4)
    batches = list(made)
    assert sum(len(batch) for batch in batches) == 44
    assert made.skipped == {}
    assert {phrase for batch in batches for row in batch.phrases for phrase in row} <= set(info.classes)
    train = loader(tmp_path / "c" / "train", tokenizer=tokenizer, train=True, crop="random", batch_size=8)
    assert next(train.forever()).region_mask.any()
    assert len(list((tmp_path / "c" / "train").glob("*.tar"))) == 4
