"""`cllip-fast report`: one page that needs nothing else, holds what the run holds, and says what it lacks."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from cllip_fast.cli import main
from cllip_fast.errors import InputError
from cllip_fast.report import write_report
from cllip_fast.train.config import Config
from tests.saved_run import LENGTHS, save_run

HOSTILE = '<script>alert("x")</script><img src=http://evil/x.png> & "quoted"'
VOID = {"img", "meta"}


class Page(HTMLParser):
    """A page read strictly: every element closed in order, everything outside kept for the assertions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make_run(root: Path, *, region: str = "prompter", hostile: bool = False, **options: object) -> Path:
    """A run as the trainer leaves it, its data in root/data."""
    run = save_run(root, region=region)
    given = {"train_data": str(root / "data" / "train"), "val_data": f"val={root / 'data' / 'train'}", "region": region}
    name = HOSTILE if hostile else "tiny"
    config = Config(**LENGTHS | given | {"steps": 40, "name": name} | options).to_dict()
    (run / "config.json").write_text(json.dumps(config | {"retired_option": HOSTILE if hostile else 1}))
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, log_lines())) + "\n")
    record = {"step": 40, "seconds": 61.2, "results": {"val": {"images": 3.0, "i2t_r1": 0.25, "pointing": None}}}
    (run / "results.json").write_text(json.dumps(record))
    return run


def log_lines() -> list[dict[str, object]]:
    training = [
        {"step": step, "loss": 9.0 / step, "contrastive_loss": 1.0, "region_loss": 2.0, "lr": 1e-3, "grad_norm": 3.0}
        | {"skipped": 0.1 if step == 20 else 0.0, "samples_seen": step, "samples_skipped": 7, "samples_total": step + 7}
        for step in (10, 20, 40)
    ]
    training[1]["loss"] = float("nan")
    return [*training, {"step": 40, "split": "val", "i2t_r1": 0.25}]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_self_contained(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert "srcset" not in attributes
        assert attributes.get("href", "#").startswith("#"), attributes
        assert not any(name.startswith("on") for name in attributes), attributes
    for picture in page.all("img"):
        assert picture["alt"]
        kind, data = picture["src"].split(",", 1)
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            assert (str(image.width), str(image.height)) == (picture["width"], picture["height"])
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= anchors


def test_the_whole_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page, source = read(run / "report.html"), (run / "report.html").read_text()
    check_self_contained(page)
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert "prefers-color-scheme: dark" in source
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    ids = [section["id"] for section in page.all("section")]
    assert ids == ["curves", "metrics", "pictures", "failures", "attention", "faults", "options", "environment"]
    # 3 images: boxes and 4 maps each; cards of 3 images, 9 regions and 9 phrases; 2 phrases of 3 images with 3 panels;
    # and two colour bars.
    assert len(page.all("img")) == 3 * 5 + 3 + 9 + 9 + 3 * 2 * 3 + 2
    assert not [paragraph for paragraph in page.all("p") if paragraph.get("class") == "note"]
    text = " ".join(page.text.split())
    for words in ("val: all samples", "0:01:01", "a red circle of a wide picture", "step_00000003.pt"):
        assert words in text, words
    # a tenth of the 10 steps to step 20; one line of three whose loss is NaN
    for row in ("gradient not being finite 1 of 40", "loss is not finite 1 of 3", "last start) 7 of 47"):
        assert row in text, row
    assert "image → text R@1 25.0 pointing –" in text


def test_what_comes_from_data_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.saved_run.CLASSES", [HOSTILE, "blue star", "green ring", "</style><b>d"])
    run = make_run(tmp_path, hostile=True)
    results = {"step": 40, "seconds": 1.0, "results": {HOSTILE: {HOSTILE: 0.5}}}
    (run / "results.json").write_text(json.dumps(results))
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 40, "split": HOSTILE, "recognition_<i>": 0.5, "recognition_b": 0.5}) + "\n")
    assert write_report(run, tmp_path / "out.html", device="cpu") == []
    page = read(tmp_path / "out.html")
    check_self_contained(page)
    assert not page.all("b")
    assert not page.all("i")
    assert page.text.count(HOSTILE) > 10
    assert "</style><b>d" in page.text
    assert any(HOSTILE in (picture["alt"] or "") for picture in page.all("img"))


def test_a_run_without_a_prompter(tmp_path: Path) -> None:
    run = make_run(tmp_path, region="roi_align", losses="clip,region")
    write_report(run, tmp_path / "out.html", device="cpu")
    page = read(tmp_path / "out.html")
    check_self_contained(page)
    assert "it has no Prompter" in page.text
    assert "Regions by loss" in page.text
    assert "Phrases by box loss" not in page.text
    assert "IoU" not in page.text
    assert "predicted from the phrase" not in page.text
    assert len(page.all("img")) == 3 * 5 + 3 + 9 + 1


def test_losses_that_were_not_trained_are_not_judged(tmp_path: Path) -> None:
    run = make_run(tmp_path, losses="clip,region")
    write_report(run, tmp_path / "out.html", device="cpu")
    page = read(tmp_path / "out.html")
    assert "did not train the grounding loss" in page.text
    assert "Phrases by box loss" not in page.text
    assert "box prompt" in page.text
    assert "phrase prompt" not in page.text


def test_a_run_whose_data_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "data")
    Image.new("RGB", (60, 40), "red").save(run / "sheet_val.png")
    assert main(["report", str(run), "--out", str(tmp_path / "deep" / "out.html"), "--device", "cpu"]) == 0
    note, wrote = capsys.readouterr().out.splitlines()
    assert note.startswith("No new pictures, failures and attention of val: ")
    assert str(tmp_path / "data" / "train") in note
    assert note.endswith("(relative paths start in the present folder)")
    assert wrote.endswith("out.html")
    page = read(tmp_path / "deep" / "out.html")
    check_self_contained(page)
    assert note in page.text
    assert "As the trainer drew them" in page.text
    assert [picture["alt"] for picture in page.all("img")] == ["Picture sheet of val: images, boxes and maps"]
    assert len(page.all("svg")) > 4
    assert "cross-entropy" not in page.text.lower()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    (run / "results.json").unlink()
    notes = write_report(run, tmp_path / "out.html")
    assert notes == ["No new pictures, failures and attention: the run has no checkpoint"]
    assert "25.0" in read(tmp_path / "out.html").text, "the log's last evaluation"
    (run / "log.jsonl").unlink()
    write_report(run, tmp_path / "out.html")
    page = read(tmp_path / "out.html")
    assert "The run has not been evaluated." in page.text
    assert not page.all("svg")


def test_samples_bound_what_is_looked_at(tmp_path: Path) -> None:
    write_report(make_run(tmp_path), tmp_path / "out.html", samples=2, device="cpu")
    page = read(tmp_path / "out.html")
    assert "val: the first 2 of 3 samples" in page.text
    assert "among 2 captions" in page.text


def test_a_model_that_is_not_finite_has_a_page_too(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    file = next((run / "checkpoints").glob("*.pt"))
    state = torch.load(file, weights_only=True)
    state["model"]["logit_scale"].fill_(torch.nan)
    state["model"]["visual.project.weight"].fill_(torch.nan)
    state["model"]["prompter.qkv.bias"].fill_(torch.nan)
    torch.save(state, file)
    assert write_report(run, tmp_path / "out.html", device="cpu") == []
    page = read(tmp_path / "out.html")
    check_self_contained(page)
    assert "loss nan" in page.text


@pytest.mark.parametrize("samples", [0, 2001])
def test_samples_out_of_range(tmp_path: Path, samples: int) -> None:
    with pytest.raises(InputError, match=f"samples is {samples}, expected 1 to 2000"):
        write_report(tmp_path, tmp_path / "out.html", samples=samples)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"cllip-fast: {tmp_path} has no config.json, expected the folder of a run, such as runs/scenes\n"
    )
    (tmp_path / "config.json").write_text('{"steps": "many"}')
    assert main(["report", str(tmp_path)]) == 2
    assert "config.json cannot be used" in capsys.readouterr().err


def test_results_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "results.json").write_text('{"results": {"val": 3}}')
    with pytest.raises(InputError, match=r"results\.json has results \{'val': 3\}, expected an object of metrics"):
        write_report(tmp_path, tmp_path / "page.html")


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(run, run / "config.json" / "out.html")
