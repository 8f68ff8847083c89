"""Class folders as ImageNet has them."""

import pytest

from cllip_fast.convert.class_folders import read
from cllip_fast.data import read_dataset_info
from cllip_fast.errors import InputError
from tests.convert.written import convert, paint, put


def test_folder_names_become_captions(tmp_path):
    images = paint(tmp_path / "images", "golden_retriever/1.jpg", "cat/1.JPEG", "cat/deep/2.jpg", "loose.jpg")
    summary, records = convert(read(images, template="a photo of a {}."), tmp_path / "out")
    assert {key: record["captions"] for key, record in records.items()} == {
        "cat/1": ["a photo of a cat."],
        "cat/deep/2": ["a photo of a cat."],
        "golden_retriever/1": ["a photo of a golden retriever."],
    }
    assert all(record["regions"] == [] for record in records.values())
    assert read_dataset_info(tmp_path / "out").classes == ["cat", "golden retriever"]
    assert summary.skipped == {}


def test_imagenet_names(tmp_path):
    images = paint(tmp_path / "train", "n01440764/n01440764_10026.JPEG")
    names = put(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    _, records = convert(read(images, names), tmp_path / "out")
    assert records["n01440764/n01440764_10026"]["captions"] == ["tench"]
    paint(images, "n02084071/1.JPEG")
    with pytest.raises(InputError, match=r"mapping\.txt has no line for the folder 'n02084071'"):
        read(images, names)
    with pytest.raises(InputError, match=r"mapping\.txt: line 'n1' has no name"):
        read(images, put(names, "n1\n"))


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place(tmp_path, template):
    with pytest.raises(InputError, match=r"expected a text with one \{\} for the class name"):
        read(tmp_path, template=template)


def test_a_folder_without_class_folders(tmp_path):
    images = paint(tmp_path / "images", "loose.jpg")
    (images / "cat").mkdir()
    with pytest.raises(InputError, match=r"images holds no folder with images, expected one for each class"):
        read(images)
