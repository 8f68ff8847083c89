"""`shards index`: DALI's format, read back by its description, and by DALI itself where it is installed."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest

from cllip_fast.data.faults import FaultCounter
from cllip_fast.data.index import index_shards
from cllip_fast.errors import InputError
from cllip_fast.shard_tools import write_indices
from tests.data.painted import jpeg
from tests.shard_tools.tars import contents, good, raw_tar, run, sample


def parse(path):
    """An index as DALI's reader takes it apart: a list of samples, each a list of (suffix, offset, size, name)."""
    first, *lines = path.read_bytes().decode().split("\n")
    version, count = first.split(" ")
    assert version == "v1.2"
    assert lines.pop() == "", "the last line is closed"
    assert len(lines) == int(count) > 0
    samples = []
    for line in lines:
        fields = line.split(" ")
        assert len(fields) % 4 == 0
        rows = [fields[i : i + 4] for i in range(0, len(fields), 4)]
        samples.append([(suffix, int(offset), int(size), name) for suffix, offset, size, name in rows])
    assert all(offset % 512 == 0 for rows in samples for _, offset, _, _ in rows), "DALI insists on whole blocks"
    return samples


def test_each_entry_leads_to_its_file(tmp_path):
    long = "folder/" + "long" * 40 + "ü"  # takes a header of its own
    files = [*sample("a.b/x"), *good(count=3), *sample(long, suffix="JPG"), ("g9.cls.txt", b"7"), *sample("g9")]
    path = raw_tar(tmp_path / "000.tar", files)
    summary = write_indices([path])
    assert summary.written == [tmp_path / "000.idx"]
    assert not summary.faults
    samples, whole, data = parse(tmp_path / "000.idx"), contents(path), path.read_bytes()
    assert len(samples) == summary.samples == 6
    for rows in samples:
        for _, offset, size, name in rows:
            assert data[offset : offset + size] == whole[name]
    assert [row[3] for rows in samples for row in rows] == [name for name, _ in files], "the tar's own order"
    assert [[row[0] for row in rows] for rows in samples[-2:]] == [["JPG", "json"], ["cls.txt", "jpg", "json"]]
    with tarfile.open(path) as tar:
        assert [row[1] for rows in samples for row in rows] == [info.offset_data for info in tar]


def test_samples_are_those_of_training_in_its_order(tmp_path):
    (xi, xj), (yi, yj), (zi, zj) = sample("x"), sample("y"), sample("z")
    files = [yj, xi, yi, ("alone.jpg", jpeg()), xj, ("x.png", jpeg()), ("note.txt", b"hi"), *sample("../up"), zi, zj]
    path = raw_tar(tmp_path / "a.tar", files)
    summary = write_indices([path])
    assert summary.left_out == {"missing record": 1, "duplicate member": 1, "unsafe name": 2}
    samples = parse(tmp_path / "a.idx")
    assert [sorted(row[3] for row in rows) for rows in samples] == [[f"{k}.jpg", f"{k}.json"] for k in "xyz"]
    index = index_shards([[path]], FaultCounter())
    for rows, place in zip(samples, index.places.tolist(), strict=True):
        by_suffix = {suffix: (offset, size) for suffix, offset, size, _ in rows}
        assert (*by_suffix["jpg"], *by_suffix["json"]) == tuple(place[1:])


def test_names_that_the_format_cannot_express_are_left_out(tmp_path, capsys):
    raw_tar(tmp_path / "a.tar", [*sample("with space"), *sample("fine"), ("fine", b"no suffix")])
    assert run("index", tmp_path) == 0
    assert [rows[0][3] for rows in parse(tmp_path / "a.idx")] == ["fine.jpg"]
    assert "1 × name with a space, first" in capsys.readouterr().out


def test_a_folder_of_its_own_and_a_second_run(tmp_path):
    paths = [raw_tar(tmp_path / f"{i}.tar", good(f"s{i}", i)) for i in (1, 2)]
    assert run("index", *paths, "--out", tmp_path / "new" / "indices") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.tar", "2.tar", "new"]
    raw_tar(paths[0], good("other", 5))
    assert run("index", *paths, "--out", tmp_path / "new" / "indices") == 0
    assert [len(parse(tmp_path / "new" / "indices" / f"{i}.idx")) for i in (1, 2)] == [5, 2]
    assert len(list((tmp_path / "new" / "indices").iterdir())) == 2


def test_a_shard_without_samples_gets_none(tmp_path, capsys):
    raw_tar(tmp_path / "a.tar", good())
    (tmp_path / "b.tar").write_bytes(b"no tar")
    assert run("index", tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.idx", "a.tar", "b.tar"]
    assert f"no index for {tmp_path / 'b.tar'}" in capsys.readouterr().out


def test_colliding_names_are_refused_before_anything_is_written(tmp_path):
    paths = [raw_tar(tmp_path / folder / "0.tar", good()) for folder in ("a", "b")]
    with pytest.raises(InputError, match=r"2 shards would be indexed as .*0\.idx"):
        run("index", *paths, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        run("index", paths[0], "--out", tmp_path / "file" / "out")


def test_an_index_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = raw_tar(tmp_path / "a.tar", good())
    (tmp_path / "a.idx").write_text("old")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match=r"a\.idx cannot be written: No space left on device"):
        write_indices([path])
    assert {p.name: p.read_bytes()[:3] for p in tmp_path.glob("*idx*")} == {"a.idx": b"old"}
    assert len(list(tmp_path.iterdir())) == 2


def test_dali_reads_the_same_files(tmp_path):
    pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    from nvidia.dali import fn, pipeline_def

    extra = [("a1.jpg", jpeg(20, 10)), ("a1.txt", b"further"), ("a1.json", json.dumps({"captions": ["ü"]}).encode())]
    paths = [raw_tar(tmp_path / "0.tar", [*good("x", 2), *extra]), raw_tar(tmp_path / "1.tar", good("y", 3))]
    summary = write_indices(paths)

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def read():
        images, records = fn.readers.webdataset(
            paths=[str(p) for p in paths], index_paths=[str(p) for p in summary.written], ext=["jpg", "json"]
        )
        return images, records

    pipeline = read()
    pipeline.build()
    images, records = pipeline.run()
    wanted = contents(paths[0]) | contents(paths[1])
    for i, key in enumerate(["x0", "x1", "a1", "y0", "y1", "y2"]):
        assert np.asarray(images[i]).tobytes() == wanted[f"{key}.jpg"]
        assert np.asarray(records[i]).tobytes() == wanted[f"{key}.json"]
