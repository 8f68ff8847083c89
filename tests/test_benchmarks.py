"""The benchmarks measure what they say: the same loss in every form, a fair order, true memory, a correct report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Peers
from benchmarks.peak import measurable, peak_mib
from benchmarks.peers import COMPILED, FILTER_THRESHOLD, FORMS, POOL_TEMPERATURE, Case, make_inputs, step
from benchmarks.report import ALONE, build, markdown
from tests import dense, dense_local


def dense_patches(pool: str, patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    mask = torch.ones(texts.shape[:2], dtype=torch.bool)
    return dense_local.patch_text(patches, texts, scale, mask, pool=pool, temperature=POOL_TEMPERATURE)


REFERENCES = {
    "clip": dense.clip,
    "siglip": dense.siglip,
    "region": partial(dense.region, threshold=FILTER_THRESHOLD),
    "patch max": partial(dense_patches, "max"),
    "patch softmax": partial(dense_patches, "softmax"),
}


@pytest.mark.parametrize(
    ("loss", "form"), [(loss, form) for loss in FORMS for form in FORMS[loss] if not form.startswith(COMPILED)]
)
def test_every_form_is_the_loss_it_is_compared_as(loss: str, form: str) -> None:
    inputs = make_inputs(Case(loss, (4, 7, 2, 8) if loss.startswith("patch") else (300, 16), scale=10.0))
    measured = step(FORMS[loss][form](), inputs)()
    exact, exact_grads = dense.value_and_gradients(REFERENCES[loss], [each.detach().double() for each in inputs])
    for value, expected in zip(measured, (exact, *exact_grads), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_peers_alternate_around_our_turn() -> None:
    order: list[str] = []
    peers = Peers({name: partial(order.append, name) for name in "ab"})
    for _ in range(3):
        peers.before()
        order.append("ours")
        peers.after()
    assert order == ["a", "b", "ours", "ours", "b", "a", "a", "b", "ours"]
    assert {name: len(seconds) for name, seconds in peers.seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.skipif(not measurable(), reason="this system does not report a process's peak memory")
def test_peak_is_that_of_the_pass_alone() -> None:
    memory = peak_mib(Case("clip", (2048, 64)), "open_clip")
    matrix, gradients = 2048**2 * 4 / 2**20, 2 * 2048 * 64 * 4 / 2**20
    assert 3 * matrix <= memory["peak"] <= 7 * matrix  # two matrices of logits, two of log-softmax; far below PyTorch
    assert memory["peak"] - memory["workspace"] == pytest.approx(gradients, abs=0.02)
    assert memory["sampled"] <= memory["peak"] + 1


@pytest.mark.slow
def test_a_run_and_its_report(tmp_path: Path) -> None:
    measured = tmp_path / "measured.json"
    run = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_losses.py",
        "-k",
        "matmul or alone",
        "--benchmark-only",
        "-q",
    ]
    # Inside one of pytest-xdist's processes, pytest-benchmark would switch itself off.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outer, "CLLIP_BENCH_SHRINK": "128", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    subprocess.run(
        [*run, "-p", "no:cacheprovider", "--benchmark-json", measured], cwd=root, env=environment, check=True
    )
    report = [sys.executable, "-m", "benchmarks.report", measured, "--out", tmp_path]
    subprocess.run(report, cwd=root, check=True)
    (path,) = tmp_path.glob("losses_cpu_*.md")
    (row,) = json.loads(path.with_suffix(".json").read_text())["comparisons"]
    assert (row["loss"], row["size"], row["peer"], row["met"]) == ("clip", "512×512", ALONE, None)
    assert row["ms"] > 0
    assert row["peer_peak_mib"] == 10 * 512**2 / 2**20
    assert "-k 'matmul or alone'" in path.read_text()


def record(loss: str, size: list[int], median: float, peak: float, peers: dict[str, tuple[float, float]]) -> dict:
    def memory(peak: float) -> dict[str, float]:
        return {"peak": peak, "workspace": peak - 1, "sampled": peak / 2}

    others = {
        name: {"median": seconds, "min": seconds, "rounds": 5, "memory": memory(top)}
        for name, (seconds, top) in peers.items()
    }
    info = {"loss": loss, "size": size, "scale": 14.3, "memory": memory(peak), "peers": others}
    return {"extra_info": info, "stats": {"median": median, "min": median / 2, "rounds": 5}}


def test_report_worked_by_hand() -> None:
    raw = {
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "machine_info": {
            "cllip_fast": {"command": "pytest", "cpu": "C", "cores": 2, "threads": 2, "torch": "2", "load": 0.5}
        },
        "benchmarks": [
            {"extra_info": {"loss": "matmul", "size": [1000]}, "stats": {"median": 0.02}},  # 100 GFLOP/s
            {"extra_info": {"world_size": 2}, "stats": {}},  # another suite's
            record("clip", [1000, 500], 0.08, 11.0, {"open_clip": (0.2, 44.0)}),
            record("patch softmax", [4, 25, 2, 500], 0.01, 2.0, {"einsum": (0.005, 3.0)}),
            record("clip", [65536, 512], 100.0, 1500.0, {}),
        ],
    }
    report = build(raw)
    clip, patch, alone = report["comparisons"]
    assert (clip["time_ratio"], clip["peak_ratio"], clip["workspace_ratio"]) == pytest.approx((2.5, 4.0, 4.3))
    assert patch["time_ratio"] == pytest.approx(0.5)
    assert alone["met"] is False
    assert alone["peer_peak_mib"] * 2**20 > 40e9
    limit = report["product_limits"][0]  # four products of 1e9 operations: 40 ms of the 80
    assert (limit["useful_gflops"], limit["hardware_gflops"]) == pytest.approx((37.5, 50.0))
    assert (limit["limit_ms"], limit["percent_of_limit"]) == pytest.approx((40.0, 50.0))
    assert report["product_limits"][1]["hardware_gflops"] == pytest.approx(4 * 2 * 100 * 8 * 500 / 0.01 / 1e9)
    text = markdown(report)
    assert "peak_mib ≤ 1430.5: **not met**" in text
    assert "commit 0123456789ab with changes" in text
