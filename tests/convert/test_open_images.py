"""Open Images' CSV files."""

import pytest

from cllip_fast.convert.open_images import read
from cllip_fast.data import read_dataset_info
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, paint, put, regions

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
ROWS = [
    "000026e7ee790996,xclick,/m/07j7r,1,0.071875,0.145,0.2,0.4,0,1,1,0,0",
    "000026e7ee790996,xclick,/m/07j7r,1,0.25,0.5,0.1,1,0,1,0,0,0",
    "000026e7ee790996,activemil,/m/0k4j,1,0.5,0.75,0,0.5,-1,-1,-1,-1,-1",
    "000026e7ee790996,xclick,/m/none,1,0.5,0.75,0,0.5,0,0,0,0,0",
    "000062a39995e348,xclick,/m/0k4j,1,0,1,0,1,0,0,0,0,0",
    "../secret,xclick,/m/0k4j,1,0,1,0,1,0,0,0,0,0",
]


def make(tmp_path, rows=ROWS, names='/m/07j7r,Tree\n/m/0k4j,"Car, or van"\n', header=HEADER):
    boxes = put(tmp_path / "boxes.csv", "\n".join([header, *rows, ""]))
    paint(tmp_path, "secret.jpg")
    return boxes, put(tmp_path / "names.csv", names), paint(tmp_path / "images", "000026e7ee790996.jpg")


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n"])
def test_rows_become_regions(tmp_path, header):
    arguments = make(tmp_path, names=f'{header}/m/07j7r,Tree\n/m/0k4j,"Car, or van"\n')
    summary, records = convert(read(*arguments), tmp_path / "out")
    assert list(records) == ["000026e7ee790996"]
    record = records["000026e7ee790996"]
    assert regions(record) == [("Tree", 25, 5, 50, 50), ("Car, or van", 50, 0, 75, 25)]
    assert record["captions"] == ["Tree, Car, or van"]
    assert summary.skipped == {
        "boxes around groups": 1,
        "boxes of an unknown class": 1,
        "images without a file": 1,
        "images with a path outside the folder": 1,
    }
    assert read_dataset_info(tmp_path / "out").classes == ["Tree", "Car, or van"]


def test_broken_files_are_named(tmp_path):
    for changes, message in (
        ({"rows": [ROWS[4], ROWS[0], ROWS[4]]}, "the rows of '000062a39995e348' are not together"),
        ({"rows": [ROWS[0], ROWS[4].replace(",0,1,0,1,", ",zero,1,0,1,")]}, r"boxes\.csv: line 3: XMin is 'zero'"),
        ({"rows": [ROWS[0], "000062a39995e348,xclick"]}, r"boxes\.csv: line 3 is cut short"),
        ({"header": HEADER.replace("XMax", "Right")}, r"boxes\.csv has no column XMax"),
        ({"names": "/m/07j7r\n"}, r"names\.csv: line 1 is '/m/07j7r', expected a label and its name"),
    ):
        with pytest.raises(InputError, match=message):
            drain(read, *make(tmp_path, **changes))
    boxes, names, images = make(tmp_path)
    boxes.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"boxes\.csv is no CSV file"):
        drain(read, boxes, names, images)
    boxes.unlink()
    with pytest.raises(InputError, match=r"boxes\.csv cannot be read: No such file"):
        drain(read, boxes, names, images)
