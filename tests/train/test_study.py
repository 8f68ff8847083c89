"""The study's page from constructed runs, partial ones included, and the whole chain on a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cllip_fast import extras
from cllip_fast.train.study_report import Study, curves_of, final_table, full, limits, name_of, plateau, values_of
from cllip_fast.train.variants import CLAIMS, GROUPS, PAIRS, SHORT, VARIANTS

STUDY = Path(__file__).parents[2] / "train" / "study.py"
METRICS = ("i2t_r1", "t2i_r1", "recognition_top1", "recognition_size", "recognition_colour", "recognition_texture",
           "recognition_shape", "r2t_r1", "r2t_r10", "t2r_r1", "t2r_r10", "grounding_acc50", "pointing")  # fmt: skip


def record(share: float, **others: float | None) -> dict:
    metrics = {"images": 500, "regions": 2000} | dict.fromkeys(METRICS, share) | others
    return {"step": 8, "seconds": 10.0, "results": {"val": metrics}, "config": {"steps": 8, "batch_size": 4}}


def study(tmp_path: Path, seeds: int, **shares: list[float]) -> Study:
    """Runs whose every metric is the share given for the seed, and rose to it from half of it at step 4."""
    made = Study("python train/study.py", ["--steps", "8"], seeds, "A study")
    for name, values in shares.items():
        for seed, share in enumerate(values):
            folder = tmp_path / f"{name}_seed{seed}"
            folder.mkdir()
            lines = [{"step": step, "split": "val"} | dict.fromkeys(METRICS, share * step / 8) for step in (4, 8)]
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            made.add(name, record(share), folder)
    return made


def test_every_name_that_is_compared_is_a_variant() -> None:
    names = [name for pair in PAIRS for name in pair[1:]] + [name for group in GROUPS.values() for name in group]
    names += [name for claim in CLAIMS for name in (claim.variant, claim.base)] + list(SHORT)
    assert set(names) == set(VARIANTS)


def test_only_a_prompter_that_has_learned_texts_of_regions_is_asked_for_them() -> None:
    assert [name for name, variant in VARIANTS.items() if not variant.reads_regions] == ["grounding_alone"]
    values = values_of({"grounding_alone": [record(0.5)], "clip": [record(0.5, grounding_acc50=None)]}, "val")
    assert set(values["grounding_alone"]) == {"i2t_r1", "t2i_r1", "retrieval", "grounding_acc50", "pointing"}
    assert values["clip"]["region_average"] == [50.0]
    assert "grounding_acc50" not in values["clip"]


def test_composed_metrics_are_means(tmp_path: Path) -> None:
    values = values_of({"all": [record(0.5, i2t_r1=0.2, t2i_r1=0.4, recognition_top1=0.8)]}, "val")["all"]
    assert values["retrieval"] == [pytest.approx(30)]
    assert values["region_average"] == [pytest.approx(60)]  # 80, 50, 50


def test_a_partial_table_says_how_many_seeds(tmp_path: Path) -> None:
    made = study(tmp_path, 3, clip=[0.1, 0.2], all=[0.5])
    lines = final_table(made.records, "val")
    assert lines[2].startswith("| CLIP only | 2 | 15.0 ± 7.1 |")
    assert lines[3].startswith("| everything | 1 | 50.0 |")
    said = "\n".join(limits(values_of(made.records, "val"), made.records, made.seeds))
    assert "1 to 2 of 3 seeds" in said
    assert "CLIP only recognises 15.0 %" in said
    assert "*CLIP + region*" in said.split("Not run: ")[1]


def test_one_seed_and_ceilings_are_admitted(tmp_path: Path) -> None:
    made = study(tmp_path, 1, clip=[0.5], all=[0.98])
    said = "\n".join(limits(values_of(made.records, "val"), made.records, made.seeds))
    assert "One seed" in said
    assert "grounding leaves" not in said
    (line,) = full(made.records)
    assert "`val`" in line
    assert "pointing (1 of 2 variants)" in line
    assert "nothing" in full({"clip": [record(0.9)]})[0]
    unseen = record(0.5)
    unseen["results"] = {"unseen": unseen["results"]["val"] | {"t2r_r10": 1.0}}
    assert "nothing" in full({"clip": [unseen]})[0]
    assert name_of("t2r_r10") not in final_table({"clip": [unseen]}, "unseen")[0]


def test_the_plateau_is_measured_against_everything(tmp_path: Path) -> None:
    made = study(tmp_path, 2, clip=[0.1, 0.1], region=[0.5, 0.7], all=[0.8, 0.8])
    lines = plateau(values_of(made.records, "val"), curves_of(made.folders, "val"))
    assert "≥ 40.0" in lines[2]
    assert [line.split(" | ")[:2] for line in lines[4:]] == [
        ["| CLIP only", "not reached"],
        ["| CLIP + region", "8"],
        ["| everything", "4"],
    ]


@pytest.mark.skipif(extras.probe("matplotlib") is None, reason="matplotlib is not installed")
def test_the_page_holds_verdicts_and_links_its_pictures(tmp_path: Path) -> None:
    made = study(tmp_path, 2, clip=[0.10, 0.11], no_grounding=[0.80, 0.81], all_roi_align=[0.40, 0.41])
    page = tmp_path / "study_cpu.md"
    made.write(page)
    text = page.read_text()
    verdicts = [line for line in text.splitlines() if line.startswith("| Prompter more than 10 points")]
    assert verdicts[0].endswith("| – | not run |")
    assert verdicts[1].endswith("| +40.0 ± 1.0 | **holds** |")
    for kind in ("curves", "final"):
        assert f"({page.stem}_{kind}.png)" in text
        assert (tmp_path / f"{page.stem}_{kind}.png").stat().st_size > 0
    assert json.loads(page.with_suffix(".json").read_text()).keys() == {"clip", "no_grounding", "all_roi_align"}


@pytest.mark.slow
@pytest.mark.skipif(extras.probe("matplotlib") is None, reason="matplotlib is not installed")
def test_the_short_form_runs_and_only_reads_the_second_time(tmp_path: Path) -> None:
    command = [sys.executable, str(STUDY), "--short", "--steps", "2", "--evaluations", "1", "--batch-size", "4",
               "--scenes", "16",
               "--variants", "clip", "all", "--scenes-dir", str(tmp_path / "scenes"),
               "--logs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "study.md"),
               "--", "--device", "cpu"]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0 runs are there, 2 to go" in first
    text = (tmp_path / "study.md").read_text()
    assert "(short form)" in text
    assert "One seed" in text
    assert "2 runs are there, 0 to go" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
