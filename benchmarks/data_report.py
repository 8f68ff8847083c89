"""Tables of the data benchmarks, as Markdown and JSON.

    python -m benchmarks.data_report .benchmarks/data.json     # -> benchmarks/results/data_cpu_<date>.{md,json}

Input: what `pytest benchmarks/test_data.py --benchmark-json` wrote.
"""

from __future__ import annotations

from typing import Any

from benchmarks.report import cell, table
from benchmarks.report_file import main, origin

GOALS = {"500×375": 1.3, "1600×1200": 3.0}  # images/s of the faster decoder, over OpenCLIP's pipeline
STAGES = ("read", "decode", "crop and resize", "normalise", "tokenise", "other")


def build(raw: dict[str, Any]) -> dict[str, Any]:
    """The report: rows of rates (one a size, number of workers and decoder) and of milliseconds by stage."""
    rates, stages = [], []
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        if info.get("suite") != "data":
            continue
        size = "×".join(map(str, info["size"]))
        if "images_per_s" in info:
            ratios = info["ratio_to_openclip"]
            best = max(ratios[name] for name in ratios if name.startswith("ours"))
            rates += [
                {
                    "size": size,
                    "workers": info["workers"],
                    "loader": name,
                    "images_per_s": rate,
                    "ratio": ratios[name],
                    "goal": GOALS.get(size) if ratios[name] == best else None,
                }
                for name, rate in info["images_per_s"].items()
            ]
        else:
            psnr = info["psnr_db"]
            stages.append(
                {"size": size, "loader": f"ours, {info['decoder']}", "psnr": psnr, **info["stages_ms"]["ours"]}
            )
            stages.append(
                {"size": size, "loader": "OpenCLIP's pipeline", "psnr": None, **info["stages_ms"]["openclip"]}
            )
    return {
        **origin(raw),
        "rates": rates,
        "stages": stages,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    return f"""# Loading data on a CPU, {report["date"]}

`{report["command"]}`, commit {report["commit"]}
({report["cpu"]}, {report["cores"]} cores, torch {report["torch"]}, load average at start {report["load"]:.2f})

JPEGs (quality 90) to batches of 16 normalised 224 × 224 squares of random windows, with captions; ours also reads and
maps four regions an image. OpenCLIP's pipeline is its own steps (`benchmarks/openclip_data.py`), Pillow and bicubic,
the same windows. Each round every loader hands over all images once, from the page cache; the median of five counts.

{table(("JPEGs", "workers", "loader", "images/s", "over OpenCLIP's", "goal"), map(rate_cells, report["rates"]))}

Milliseconds an image, one process and thread. PSNR: our pixels against full Pillow (decoded whole, then cropped and
resized), over all images and of the worst one.

{table(("JPEGs", "loader", *STAGES, "sum", "PSNR, dB: all (worst)"), map(stage_cells, report["stages"]))}
"""


def rate_cells(row: dict[str, Any]) -> list[str]:
    goal = row["goal"]
    verdict = f"{goal:g}: {'met' if row['ratio'] >= goal else '**not met**'}" if goal else ""
    return [
        row["size"],
        str(row["workers"]),
        row["loader"],
        cell(row["images_per_s"], 0),
        cell(row["ratio"], 2),
        verdict,
    ]


def stage_cells(row: dict[str, Any]) -> list[str]:
    psnr = f"{row['psnr']['all']:.1f} ({row['psnr']['worst']:.1f})" if row["psnr"] else "reference"
    times = [row[stage] for stage in STAGES]
    return [row["size"], row["loader"], *(cell(each, 2) for each in times), cell(sum(times), 2), psnr]


if __name__ == "__main__":
    main("Tables of the data benchmarks.", "data", build, markdown)
