"""The GPU report's control flow, on a CPU: what it writes, what it claims, what happens when time is up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_forms, gpu_report
from benchmarks.peers import COMPILED, OURS, Case
from tests import dense


def dry_run(out: Path, *arguments: str) -> tuple[dict, str]:
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--dry-run", "--date", "2026-01-02", "--out", str(out), *arguments])
    assert not ended.value.code
    path = out / "dryrun_cpu_2026-01-02.json"
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_dry_run_goes_through_every_section_and_claims_nothing(tmp_path: Path) -> None:
    report, text = dry_run(tmp_path)
    assert list(report["sections"]) == list(gpu_report.SECONDS)
    assert report["sections"]["tests"].startswith("pytest")
    assert {row["loss"] for row in report["rows"]} == set(gpu_forms.FORMS)
    for row in report["rows"]:
        figures = [row[name] for name in row if name.endswith(("ms", "_mib", "tflops", "matmul", "ours"))]
        assert set(figures) == {None}
        assert row["rounds"] in (1, 2) or row["note"].startswith("not installed")
        assert row["form"] != OURS or row["note"] == ""
    assert report["matmul_tflops"] is None
    assert "nothing here is a measurement" in text


def test_when_time_is_up_the_rest_is_skipped_and_said(tmp_path: Path) -> None:
    report, text = dry_run(tmp_path, "--seconds", "0")
    assert set(report["sections"].values()) == {"skipped: all of the 0 s are spent"}
    assert report["rows"] == []
    assert "| clip | skipped" in text


@pytest.mark.parametrize("loss", gpu_forms.FORMS)
def test_every_form_computes_the_same_loss(loss: str) -> None:
    case = Case(loss, (5, 6, 2, 8) if loss.startswith("patch") else (300, 16), scale=10.0)
    inputs = gpu_forms.inputs_on(case, torch.device("cpu"), torch.float32)
    for name, make in gpu_forms.FORMS[loss].items():
        if name == OURS:
            expected = gpu_report.step(make(case), inputs)()
        elif name in ("open_clip", "dense", "einsum", "linear_cross_entropy", gpu_forms.PLAIN):
            theirs = gpu_report.step(make(case), inputs)()
            assert gpu_report.difference(expected, theirs) < 1e-3, name
        else:
            assert name.startswith(COMPILED) or name in gpu_forms.PEER_PACKAGES


def test_difference_sees_a_wrong_gradient() -> None:
    good = list(dense.features(3, 4, torch.float32))
    assert gpu_report.difference([*good, None], [*good, torch.ones(())]) == 0
    assert gpu_report.difference(good, [good[0], 1.1 * good[1]]) == pytest.approx(0.1, rel=1e-5)


def test_rates_worked_by_hand() -> None:
    rows = [
        gpu_report.Row("clip", "1000×500", OURS, 14.3, ms=2.0),
        gpu_report.Row("clip", "1000×500", "open_clip", 14.3, ms=5.0),
        gpu_report.Row("clip", "1000×500", "memeff", 14.3),
    ]
    gpu_report.add_rates(rows, Case("clip", (1000, 500)), matmul=10.0)
    ours, peer, absent = rows
    # A product is 1e9 operations: 3 of them are useful, ours runs 4.
    assert (ours.useful_tflops, ours.hardware_tflops) == pytest.approx((1.5, 2.0))
    assert ours.percent_of_matmul == pytest.approx(20)
    assert (peer.times_ours, peer.useful_tflops, peer.hardware_tflops) == (2.5, pytest.approx(0.6), None)
    assert absent.times_ours is None


@pytest.mark.parametrize(
    ("plain", "expected"), [((1, 2, 8), "724"), ((2, 3, 9), "below 256"), ((0.5, 0.5, 0.5), "above 1024")]
)
def test_where_the_kernels_become_the_faster_ones(plain: tuple[float, ...], expected: str) -> None:
    """Ratios 0.8 at 512 and 1.25 at 1024: even at their geometric mean."""
    rows = []
    for size, ours, other in zip((256, 512, 1024), (1.5, 2.5, 6.4), plain, strict=True):
        rows.append(gpu_report.Row("clip", f"{size}×512", OURS, 14.3, ms=ours))
        rows.append(gpu_report.Row("clip", f"{size}×512", gpu_forms.PLAIN, 14.3, ms=other))
    assert gpu_report.crossovers(rows) == {"clip": expected}


def test_what_does_not_fit_or_fails_is_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: Exception):
        def make(case: Case):
            raise error

        return make

    forms = {
        OURS: gpu_forms.FORMS["clip"][OURS],
        "large": refuse(torch.OutOfMemoryError("CUDA")),
        "absent": refuse(ImportError("no module")),
        "broken": refuse(RuntimeError("a | b")),
        "other": lambda case: lambda images, texts, scale: (images * texts).sum() * scale,
    }
    monkeypatch.setitem(gpu_report.FORMS, "clip", forms)
    device = gpu_report.Device(dry_run=True)
    rows = gpu_report.measure(Case("clip", (300, 16)), device, torch.float32, None, math.inf)
    assert [row.note for row in rows] == [
        "",
        "out of memory",
        "not installed: no module",
        "failed: RuntimeError: a / b",
        "differs",
    ]
    rows = gpu_report.measure(Case("clip", (300, 16)), device, torch.float32, None, -math.inf)
    assert {row.note for row in rows} == {"skipped: no time left"}
