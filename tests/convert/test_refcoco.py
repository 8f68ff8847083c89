"""RefCOCO's pickles and their JSON form, RefCOCO-S's records, and pickles that want more than data."""

import collections
import os
import pickle

import pytest

from cllip_fast.convert.refcoco import read
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, paint, put, regions

REFS = [
    {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000000005_7.jpg",  # with the annotation's number: no image has this name
        "ann_id": 7,
        "ref_id": 0,
        "image_id": 5,
        "split": "train",
        "sentences": [
            {"tokens": ["the", "cat"], "raw": "The cat!", "sent_id": 0, "sent": "the cat"},
            {"tokens": ["left", "one"], "raw": "left one", "sent_id": 1, "sent": "left one"},
        ],
        "category_id": 17,
    },
    {"ann_id": 8, "ref_id": 1, "image_id": 5, "split": "train", "sentences": [{"sent": "dog"}], "sent_ids": [2]},
    {"ann_id": 9, "ref_id": 2, "image_id": 6, "split": "testA", "sentences": [{"sent": "man"}], "sent_ids": [3]},
]
INSTANCES = {
    "images": [
        {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": 100, "height": 50, "license": 1} for n in (5, 6)
    ],
    "annotations": [
        {"id": 7, "image_id": 5, "category_id": 17, "bbox": [10, 5, 20.5, 30], "iscrowd": 0},
        {"id": 8, "image_id": 5, "category_id": 18, "bbox": [50, 0, 60, 50], "iscrowd": 0},
        {"id": 9, "image_id": 6, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    "licenses": [{"id": 1, "name": "CC BY"}],
}


@pytest.fixture
def folder(tmp_path):
    """Images and instances.json."""
    paint(tmp_path / "images", *(image["file_name"] for image in INSTANCES["images"]))
    put(tmp_path / "instances.json", INSTANCES)
    return tmp_path


@pytest.mark.parametrize("form", ["protocol 0", "protocol 2", "json"])
def test_phrases_become_regions(folder, form):
    refs = put(folder / "refs.json", REFS)
    if form != "json":
        refs = folder / "refs(unc).p"
        refs.write_bytes(pickle.dumps(REFS, protocol=int(form[-1])))
    summary, records = convert(read(refs, folder / "images", folder / "instances.json"), folder / "out")
    assert list(records) == ["000000000005", "000000000006"]
    five, six = records.values()
    boxes = [("the cat", 10, 5, 30.5, 35), ("left one", 10, 5, 30.5, 35), ("dog", 50, 0, 100, 50)]
    assert regions(five) == boxes
    assert five["captions"] == ["the cat, left one, dog"]
    assert five["licence"] == "CC BY"
    assert regions(six) == [("man", 1, 2, 4, 6)]
    assert summary.changed == {"boxes clipped to the image": 1}


def test_one_split_with_the_images_own_captions(folder):
    refs = put(folder / "refs.json", REFS)
    captions = put(folder / "captions.json", {"annotations": [{"image_id": 5, "caption": "Pets."}]})
    source = read(refs, folder / "images", folder / "instances.json", captions=captions, split="train")
    summary, records = convert(source, folder / "out")
    assert {key: record["captions"] for key, record in records.items()} == {"000000000005": ["Pets."]}
    assert summary.skipped == {"phrases of other splits": 1}


def test_records_with_their_own_boxes(folder):
    record = {"file_name": "COCO_train2014_000000000005.jpg", "normal_caption": "cat", "solution": [1.0, 2, 30, 40]}
    absent = record | {"normal_caption": "horse", "solution": None}
    refs = put(folder / "refcocos.json", [record, absent])
    summary, records = convert(read(refs, folder / "images"), folder / "out")
    assert regions(records["000000000005"]) == [("cat", 1, 2, 30, 40)]
    assert summary.skipped == {"phrases that refer to nothing": 1}
    with pytest.raises(InputError, match="has boxes of its own"):
        read(refs, folder / "images", split="train")
    put(refs, [record, record | {"solution": [1, 2]}])
    with pytest.raises(InputError, match=r"refcocos\.json: entry\[1\]\.solution is \[1, 2\], expected 4 numbers"):
        drain(read, refs, folder / "images")


class Evil:
    def __init__(self, call, *arguments):
        self.value = (call, arguments)

    def __reduce__(self):
        return self.value


def test_a_pickle_runs_no_code(folder):
    trace = folder / "trace"
    bodies = [
        pickle.dumps([Evil(os.mkdir, str(trace))]),
        pickle.dumps([Evil(eval, f"__import__('os').mkdir({str(trace)!r})")], protocol=0),
        pickle.dumps(collections.OrderedDict(a=1)),
        pickle.dumps(REFS)[:-20],
        b"",
        b"not a pickle",
        b"cbuiltins\nprint\n.",
        b"\x80\x02]q\x00(K\x01K\x02eR.",
    ]
    for body in bodies:
        (folder / "refs.p").write_bytes(body)
        with pytest.raises(InputError, match=r"refs\.p is no plain pickle"):
            read(folder / "refs.p", folder / "images", folder / "instances.json")
    assert not trace.exists()


def test_a_pickle_that_holds_itself_is_refused(folder):
    bomb: list = []
    bomb.append(bomb)
    layers: list = ["x"]
    for _ in range(60):
        layers = [layers, layers]  # 2 ** 60 texts when printed
    for body in (bomb, layers, {"a": 1}, 7):
        (folder / "refs.p").write_bytes(pickle.dumps(body))
        with pytest.raises(InputError, match=r"refs\.p: entry"):
            read(folder / "refs.p", folder / "images", folder / "instances.json")


def test_bad_references_are_refused_with_their_place(folder):
    for changes, message in (
        ({"ann_id": "7"}, r"entry\[0\] has ann_id '7', expected an integer"),
        ({"sentences": [{"raw": "x"}]}, r"entry\[0\]\.sentences\[0\] has sent None, expected a text"),
        ({"ann_id": 77}, r"entry\[0\] refers to annotation 77, which .*instances\.json lacks"),
    ):
        refs = put(folder / "refs.json", [REFS[0] | changes])
        with pytest.raises(InputError, match=message):
            drain(read, refs, folder / "images", folder / "instances.json")
    refs = put(folder / "refs.json", REFS)
    with pytest.raises(InputError, match=r"name its instances\.json with --instances"):
        read(refs, folder / "images")
    with pytest.raises(InputError, match="split is 'dev', expected one of testA, train"):
        drain(read, refs, folder / "images", folder / "instances.json", split="dev")


def test_real_phrases(coco, tmp_path):
    captions = coco / "annotations" / "captions.json"
    source = read(coco / "annotations" / "refcocos.json", coco / "images", captions=captions)
    summary, records = convert(source, tmp_path / "out")
    assert summary.skipped["phrases that refer to nothing"] == 3
    assert sum(len(record["regions"]) for record in records.values()) == 73
    assert regions(records["000000001268"]) == [("person holding a goose feather", 20, 213, 81, 285)]
    assert len(records["000000001268"]["captions"]) >= 5
