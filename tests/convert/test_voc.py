"""Pascal VOC's XML: boxes that count from 1, parts, sizes, paths that lead elsewhere, entities that explode."""

import pytest

from cllip_fast.convert.voc import read
from cllip_fast.data import read_dataset_info
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, paint, put, regions

XML = """<annotation>
  <folder>VOC2007</folder><filename>000005.jpg</filename>
  <source><database>The VOC2007 Database</database><image>flickr</image></source>
  <size><width>100</width><height>50</height><depth>3</depth></size>
  <segmented>0</segmented>
  <object>
    <name>person</name><pose>Rear</pose><truncated>0</truncated><difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>64</xmax><ymax>50</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></part>
  </object>
  <object>
    <name>chair</name><bndbox><ymax>30</ymax><ymin>2</ymin><xmax>99.5</xmax><xmin>45.70000076293945</xmin></bndbox>
  </object>
</annotation>"""


def make(tmp_path, xml=XML):
    put(tmp_path / "Annotations" / "000005.xml", xml)
    return tmp_path / "Annotations", paint(tmp_path / "JPEGImages", "000005.jpg")


def test_objects_become_regions_and_classes(tmp_path):
    summary, records = convert(read(*make(tmp_path)), tmp_path / "out")
    assert regions(records["000005"]) == [("person", 0, 10, 64, 50), ("chair", 44.7, 1, 99.5, 30)]
    assert records["000005"]["captions"] == ["person, chair"]
    assert read_dataset_info(tmp_path / "out").classes == ["person", "chair"]
    assert (summary.skipped, summary.changed) == ({}, {})


def test_size_path_and_list(tmp_path):
    annotations, images = make(tmp_path)
    put(annotations / "wrong.xml", XML.replace("<width>100<", "<width>101<"))
    put(annotations / "zero.xml", XML.replace("<width>100<", "<width>0<"))
    put(annotations / "out.xml", XML.replace("000005.jpg", "../secret.jpg"))
    paint(tmp_path, "secret.jpg")
    summary, records = convert(read(annotations, images), tmp_path / "all")
    assert list(records) == ["000005", "zero"]
    assert summary.skipped == {
        "images of another size than recorded": 1,
        "images with a path outside the folder": 1,
    }
    listed = put(tmp_path / "ImageSets" / "Main" / "train.txt", "zero\n000005 1\n")
    assert [sample.key for sample in drain(read, annotations, images, listed)] == ["000005", "zero"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmin>1</xmin>", "<xmin>left</xmin>", r"000005\.xml: object\[0\]: xmin is 'left', expected a number"),
        ("<xmin>1</xmin>", "<xmin>inf</xmin>", r"object\[0\]: xmin is 'inf', expected a number"),
        ("<name>chair</name>", "", r"000005\.xml: object\[1\] has no name or no bndbox"),
        ("<filename>000005.jpg</filename>", "", r"000005\.xml has no filename"),
        ("</annotation>", "", r"000005\.xml is not XML"),
    ],
)
def test_broken_annotations_are_named(tmp_path, old, new, message):
    with pytest.raises(InputError, match=message):
        drain(read, *make(tmp_path, XML.replace(old, new)))


def test_entities_do_not_explode(tmp_path):
    layers = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 100}">' for n in range(12))
    xml = f"<!DOCTYPE annotation [{layers}]><annotation><filename>&e11;</filename></annotation>"
    with pytest.raises(InputError, match=r"000005\.xml is not XML"):
        drain(read, *make(tmp_path, xml))
    with pytest.raises(InputError, match=r"holds no \*\.xml file"):
        read(tmp_path / "JPEGImages", tmp_path / "JPEGImages")
