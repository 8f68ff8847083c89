"""The subcommand `convert`: every format is there, and bad input ends in one line."""

import re
import shlex
from pathlib import Path

import pytest

from cllip_fast.cli import main
from cllip_fast.convert.cli import FORMATS
from tests.convert.written import paint, put, read_records, regions


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_shows_its_layout(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Layout " in said
    assert "--out" in said


def test_the_documented_commands_parse(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^cllip-fast convert .*", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(shlex.split(command)[1:]) == 2  # there is no data here; a wrong option would raise SystemExit
        assert "does not exist" in capsys.readouterr().err
    assert list(dict.fromkeys(shlex.split(command)[2] for command in commands)) == list(FORMATS)


def test_a_whole_conversion(tmp_path, capsys):
    paint(tmp_path / "images", "a.jpg")
    put(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    put(tmp_path / "names", "cat\n")
    arguments = [f"--{name}={tmp_path / name}" for name in ("images", "labels", "names", "out")]
    assert main(["convert", "yolo", *arguments, "--val-share", "0"]) == 0
    assert "written 0 val images, 1 train images, 1 regions, 1 captions" in capsys.readouterr().out
    assert regions(read_records(tmp_path / "out")["a"]) == [("cat", 25, 12.5, 75, 37.5)]
    assert main(["convert", "yolo", *arguments]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_command_line_reports_errors_in_one_line(tmp_path, capsys):
    arguments = ["convert", "coco", "--instances", "x.json", "--captions", "y.json", "--images", str(tmp_path)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "cllip-fast: x.json cannot be read: No such file or directory\n"
    assert main(["scenes", "--out", str(tmp_path / "s"), "--train", "0"]) == 2
    assert "train is 0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["scenes", "--out", str(tmp_path / "file" / "s" / "t"), "--train", "1"]) == 2
    assert capsys.readouterr().err == f"cllip-fast: {tmp_path}/file/s/t cannot be written: Not a directory\n"


def test_scenes_from_the_command_line(tmp_path, capsys):
    counts = ["--train", "3", "--val", "2", "--unseen", "1", "--processes", "1"]
    assert main(["scenes", "--out", str(tmp_path / "s"), *counts]) == 0
    assert "3 train, 2 val, 1 unseen scenes" in capsys.readouterr().out
    assert (tmp_path / "s" / "unseen" / "000000.tar").is_file()
