"""Flickr30k Entities: markup, several boxes an entity, several entities a box, scenes."""

import pytest

from cllip_fast.convert.flickr30k import read
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, paint, put, regions

SENTENCES = """[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look on in [/EN#8/scene the yard] .
[/EN#1/people Two men] ride [/EN#6/vehicles/scene the subway] with [/EN#0/notvisual nothing] .

A plain sentence .
"""
XML = """<annotation>
  <filename>36979.jpg</filename>
  <size><width>100</width><height>50</height><depth>3</depth></size>
  <object><name>1</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>20</xmax><ymax>50</ymax></bndbox></object>
  <object><name>1</name><name>2</name>
    <bndbox><xmin>51</xmin><ymin>1</ymin><xmax>100</xmax><ymax>30</ymax></bndbox></object>
  <object><name>6</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>50</ymax></bndbox></object>
  <object><name>8</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""


@pytest.fixture
def places(tmp_path):
    """`read`'s arguments for one image."""
    put(tmp_path / "Sentences" / "36979.txt", SENTENCES)
    put(tmp_path / "Annotations" / "36979.xml", XML)
    return tmp_path / "Sentences", tmp_path / "Annotations", paint(tmp_path / "images", "36979.jpg")


def test_phrases_take_every_box_of_their_entity(places, tmp_path):
    summary, records = convert(read(*places), tmp_path / "out")
    assert records["36979"]["captions"] == [
        "Two young guys with shaggy hair look on in the yard .",
        "Two men ride the subway with nothing .",
        "A plain sentence .",
    ]
    assert regions(records["36979"]) == [
        ("Two young guys", 0, 10, 20, 50),
        ("Two young guys", 50, 0, 100, 30),
        ("shaggy hair", 50, 0, 100, 30),
        ("Two men", 0, 10, 20, 50),
        ("Two men", 50, 0, 100, 30),
        ("the subway", 0, 0, 100, 50),
    ]
    assert summary.skipped == {"phrases without a box": 2}
    assert summary.changed == {}


def test_a_list_chooses_images(places, tmp_path):
    put(places[0] / "7.txt", "One .")
    put(places[1] / "7.xml", XML)
    chosen = drain(read, *places, put(tmp_path / "train.txt", "36979\n\n"))
    assert [sample.key for sample in chosen] == ["36979"]
    with pytest.raises(InputError, match=r"test\.txt names '8', but .*Sentences holds no 8\.txt"):
        read(*places, put(tmp_path / "test.txt", "8\n7\n"))


def test_broken_files_are_named(places):
    sentences, annotations, _ = places
    for path, text, message in (
        (sentences / "36979.txt", "[/EN#1/people Two", r"36979\.txt: sentence 1 has markup that does not end"),
        (annotations / "36979.xml", XML.replace("<xmin>51</xmin>", ""), r"36979\.xml: object\[1\]: xmin is None"),
        (annotations / "36979.xml", XML[:-5], r"36979\.xml is not XML"),
        (annotations / "36979.xml", '<?xml version="1.0" encoding="martian"?><a/>', r"36979\.xml is not XML"),
    ):
        put(path, text)
        with pytest.raises(InputError, match=message):
            drain(read, *places)
        put(sentences / "36979.txt", SENTENCES)
    (annotations / "36979.xml").unlink()
    with pytest.raises(InputError, match=r"36979\.xml cannot be read: No such file"):
        drain(read, *places)
