"""GRIT as img2dataset writes it: tars with JSON, parquet beside them, and tars that are up to something."""

import io
import json
import sys
import tarfile

import pytest

from cllip_fast.convert.grit import read
from cllip_fast.errors import InputError
from tests.convert.written import convert, drain, read_members, regions
from tests.data.painted import jpeg

CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
ENTRY = {
    "key": "000000012",
    "caption": CAPTION,
    "url": "https://example.org/1.jpg",
    "status": "success",
    "width": 100,
    "height": 50,
    "noun_chunks": [[19, 32, 0.1, 0.2, 0.5, 0.8, 0.79298526], [0.0, 13.0, 0.0, 0.0, 1.0, 1.0, 0.675]],
    "ref_exps": [[19, 66, 0.1, 0.2, 0.5, 0.8, 0.79298526], [0.0, 13.0, 0.0, 0.0, 1.0, 1.0, 0.675]],
}


def write_tar(path, *members):
    """A tar of (name, bytes), (name, object for JSON) or ready-made TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_spans_become_phrases_and_shares_pixels(tmp_path):
    picture = jpeg(100, 50)
    write_tar(
        tmp_path / "grit" / "00000.tar",
        ("000000012.jpg", picture),
        ("000000012.json", ENTRY),
        ("000000012.txt", CAPTION.encode()),
    )
    other = ENTRY | {"noun_chunks": [[0, 99, 0.1, 0.1, 0.2, 0.2, 0.5]], "ref_exps": None}
    silent = ENTRY | {"caption": None}
    write_tar(
        tmp_path / "grit" / "00001.tar",
        *(("000010001.jpg", picture), ("000010001.json", other)),
        *(("000010002.jpg", picture), ("000010002.json", silent)),
        *(("000010003.jpg", picture), ("000010004.json", ENTRY)),
    )
    summary, records = convert(read(tmp_path / "grit"), tmp_path / "out")
    assert list(records) == ["000000012", "000010001"]
    assert records["000000012"]["captions"] == [CAPTION]
    assert records["000000012"]["source"] == "https://example.org/1.jpg"
    assert regions(records["000000012"]) == [
        ("a paper cover", 10, 10, 50, 40, 0.793),
        ("a wire hanger", 0, 0, 100, 50, 0.675),
        ("a paper cover that reads we heart our customers", 10, 10, 50, 40, 0.793),
    ]
    assert regions(records["000010001"]) == []
    assert summary.skipped == {
        "phrases outside their caption": 1,
        "images without a caption": 1,
        "images without a record": 1,
        "images without a file": 1,
    }
    assert read_members(tmp_path / "out" / "train" / "000000.tar")["000000012.jpg"] == picture


def test_member_names_are_not_trusted(tmp_path):
    link = tarfile.TarInfo("000000001.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    write_tar(
        tmp_path / "t" / "0.tar",
        *(("../../up.jpg", jpeg(100, 50)), ("../../up.json", ENTRY)),
        *(link, ("000000001.json", ENTRY)),
        *(("./000000002.jpg", jpeg(100, 50)), ("./000000002.json", ENTRY)),
    )
    summary, records = convert(read(tmp_path / "t"), tmp_path / "out")
    assert list(records) == ["000000002"]
    assert summary.skipped == {
        "archive members: unsafe name": 2,
        "archive members: not a regular file": 1,
        "images without a file": 1,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out", "t"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noun_chunks": [[0, 5, 0, 0, 1, 1]]}, r"0\.tar: 1\.noun_chunks\[0\] is .*, expected 7 numbers"),
        ({"noun_chunks": "[]"}, r"0\.tar: 1 has noun_chunks of type str, expected a list"),
        ({"ref_exps": [[0, 5, 0, 0, 1, 1, 1.5]]}, r"1\.ref_exps\[0\] has score 1\.5, expected 0 to 1"),
    ],
)
def test_broken_records_are_named(tmp_path, changes, message):
    path = write_tar(tmp_path / "0.tar", ("1.jpg", jpeg()), ("1.json", ENTRY | changes))
    with pytest.raises(InputError, match=message):
        drain(read, path)


def test_other_broken_files_are_named(tmp_path):
    plain = {name: value for name, value in ENTRY.items() if name != "noun_chunks"}
    path = write_tar(tmp_path / "0.tar", ("1.jpg", jpeg()), ("1.json", plain))
    with pytest.raises(InputError, match=r"0\.tar: 1 has no noun_chunks: let img2dataset save it"):
        drain(read, path)
    write_tar(path, ("1.jpg", jpeg()), ("1.json", b"{"))
    with pytest.raises(InputError, match=r"0\.tar: 1\.json is not JSON"):
        drain(read, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"0\.tar is no complete tar"):
        drain(read, path)


def test_parquet_without_pyarrow_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write_tar(tmp_path / "0.tar", ("1.jpg", jpeg()))
    with pytest.raises(InputError, match="metadata 'parquet' needs pyarrow"):
        read(path, "parquet")
    with pytest.raises(InputError, match="metadata is 'csv', expected one of json, parquet"):
        read(path, "csv")


def test_parquet_beside_the_tar(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, an optional package, is not installed")
    from pyarrow import parquet

    path = write_tar(tmp_path / "0.tar", ("000000012.jpg", jpeg(100, 50)), ("000000013.jpg", jpeg(100, 50)))
    with pytest.raises(InputError, match=r"0\.parquet cannot be read"):
        drain(read, path, "parquet")
    parquet.write_table(pyarrow.Table.from_pylist([ENTRY]), path.with_suffix(".parquet"))
    summary, records = convert(read(path, "parquet"), tmp_path / "out")
    assert len(regions(records["000000012"])) == 3
    assert summary.skipped == {"images without a record": 1}
    parquet.write_table(pyarrow.Table.from_pylist([{"key": "1"}]), path.with_suffix(".parquet"))
    with pytest.raises(InputError, match=r"0\.parquet is no parquet file of img2dataset"):
        drain(read, path, "parquet")
    path.with_suffix(".parquet").write_bytes(b"junk" * 10)
    with pytest.raises(InputError, match=r"0\.parquet is no parquet file"):
        drain(read, path, "parquet")
