from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.show import curves, training_curves
from cllip_fast.show.curves import PANELS, find_names, read_log

needs_matplotlib = pytest.mark.skipif(extras.probe("matplotlib") is None, reason="matplotlib is not installed")


def write_log(path: Path) -> Path:
    lines = []
    for step in range(20, 201, 20):
        figures = {"loss": 9 / step, "contrastive_loss": 4 / step, "region_loss": 5 / step, "lr": 1e-3, "ms": 400.0}
        scales = {"logit_scale": 14.3, "region_logit_scale": 14.5, "grad_norm": 1.0, "images_per_s": 160.0}
        lines.append({"step": step, **figures, **scales, "data_wait": 0.01})
    for step in (100, 200):
        for split in ("val", "unseen"):
            metrics = {"i2t_r1": step / 200, "recognition_top1": 0.5, "recognition_colour": 1.0, "grounding_iou": None}
            lines.append({"step": step, "split": split, **metrics})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_read_log_keeps_the_last_of_a_repeated_step_and_drops_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 20, "loss": 3.0}\n{"step": 40, "loss": NaN, "lr": 0.1}\n{"step": 60, "loss": 2.5}\n'
        '{"step": 40, "loss": 2.0}\n{"step": 40, "split": "val", "pointing": 0.5, "grounding_iou": null}\n'
        '{"step": 80, "lo'
    )
    training, splits = read_log(path)
    assert training == {"loss": ([20, 40, 60], [3.0, 2.0, 2.5]), "lr": ([40], [0.1])}
    assert splits == {"val": {"pointing": ([40], [0.5])}}


def test_names_are_chosen_by_pattern() -> None:
    log = {"region_loss": ([1], [1.0]), "loss": ([1], [1.0]), "contrastive_loss": ([1], [1.0]), "ms": ([1], [1.0])}
    parts = next(panel for panel in PANELS if panel.names == ("*_loss",))
    assert find_names(parts, [log]) == ["region_loss", "contrastive_loss"]
    assert find_names(parts, [{"lr": ([1], [1.0])}]) == []


@needs_matplotlib
def test_curves_are_drawn(tmp_path: Path) -> None:
    with_metrics = training_curves(write_log(tmp_path / "log.jsonl"), tmp_path / "deep" / "curves.png")
    assert with_metrics == tmp_path / "deep" / "curves.png"
    picture = Image.open(with_metrics).convert("RGB")
    assert picture.size == (1560, 990)  # nine panels in three rows: seven of training, two of metrics
    pixels = {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= pixels  # the first two lines' colours


@needs_matplotlib
def test_every_split_and_name_gets_its_line(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    _, splits = read_log(write_log(tmp_path / "log.jsonl"))
    panel = next(panel for panel in PANELS if panel.title == "Region recognition")
    axes = Figure().add_subplot()
    curves.draw_panel(axes, panel, find_names(panel, splits.values()), splits)
    assert len(axes.lines) == 4
    assert {line.get_linestyle() for line in axes.lines} == {"-", "--"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["top-1", "colour"]
    assert axes.get_title(loc="right") == "solid ● val,  dashed ■ unseen"
    assert list(axes.lines[0].get_ydata()) == [50.0, 50.0]  # in %


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which is not a file"):
        read_log(tmp_path / "absent.jsonl")
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 20, "loss": 3.0}\nstep 40\n{"step": 60, "loss": 2.0}\n')
    with pytest.raises(InputError, match="line 2 is 'step 40'"):
        read_log(path)


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"step": 1, "split": ["val"]}', b"[1]"])
def test_lines_that_are_no_records_are_named(tmp_path: Path, line: bytes) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(line + b'\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(InputError, match=r"line 1 is .*expected a JSON object with a step"):
        read_log(log)


@needs_matplotlib
def test_an_empty_log_has_nothing_to_draw(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("")
    with pytest.raises(InputError, match="no figures"):
        training_curves(path, tmp_path / "curves.png")


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "probe", lambda name: None)
    with pytest.raises(InputError, match=r"training_curves needs matplotlib.*cllip-fast\[plots\]"):
        training_curves(write_log(tmp_path / "log.jsonl"), tmp_path / "curves.png")
