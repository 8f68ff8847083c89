"""The data benchmarks' report: ratios, goals of the faster decoder alone, stages that add up."""

from __future__ import annotations

from typing import Any

from benchmarks.data_report import build, markdown


def measured(rates: dict[str, float]) -> dict[str, Any]:
    peer = rates["OpenCLIP's pipeline"]
    throughput = {
        "suite": "data", "size": [1600, 1200], "workers": 2, "images_per_s": rates,
        "ratio_to_openclip": {name: rate / peer for name, rate in rates.items()},
    }  # fmt: skip
    ours = {"read": 1, "decode": 2, "crop and resize": 3, "normalise": 4, "tokenise": 5, "other": 6}
    stages = {
        "suite": "data", "size": [1600, 1200], "decoder": "pillow", "psnr_db": {"all": 50.0, "worst": 40.0},
        "stages_ms": {"ours": ours, "openclip": ours},
    }  # fmt: skip
    machine = {"command": "pytest", "cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2", "load": 0.0}
    return {
        "datetime": "2026-01-02T03:04:05", "commit_info": {"id": "abc", "dirty": True},
        "machine_info": {"cllip_fast": machine},
        "benchmarks": [{"extra_info": each} for each in (throughput, stages, {"loss": "clip"})],
    }  # fmt: skip


def test_goal_is_judged_by_the_faster_decoder() -> None:
    text = markdown(build(measured({"ours, pillow": 200, "ours, simplejpeg": 310, "OpenCLIP's pipeline": 100})))
    assert "| ours, simplejpeg | 310 | 3.10 | 3: met |" in text
    assert "| ours, pillow | 200 | 2.00 |  |" in text
    assert "commit abc with changes" in text
    missed = markdown(build(measured({"ours, pillow": 299, "OpenCLIP's pipeline": 100})))
    assert "| ours, pillow | 299 | 2.99 | 3: **not met** |" in missed


def test_stages_are_summed() -> None:
    text = markdown(build(measured({"ours, pillow": 200, "OpenCLIP's pipeline": 100})))
    assert "| 6.00 | 21.00 | 50.0 (40.0) |" in text
    assert "| 21.00 | reference |" in text
