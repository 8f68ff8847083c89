"""Tables from a run of the benchmarks, as Markdown and JSON.

    python -m benchmarks.report .benchmarks/losses.json     # -> benchmarks/results/losses_cpu_<date>.{md,json}

Input: what `pytest benchmarks --benchmark-json` wrote; rows of other benchmarks than those that use `compare` are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.peers import COMPILED
from benchmarks.report_file import main, origin
from cllip_fast.streaming.small import plain_rows

SMALL_ROWS = plain_rows("info_nce", "cpu")


class Products(NamedTuple):
    """Products of all rows with all columns in one forward and backward pass."""

    useful: int  # what the loss and its gradients need: 1 forward, 2 backward
    hardware: float  # what our streamed form multiplies
    small: float  # what our plain form multiplies, up to SMALL_ROWS rows


# A product is 2 · rows · columns · D operations. Hardware: scores forward, scores again backward unless forward leaves
# the gradient, and one for each side's gradient; the conflict filter's quarter of the cosines once forward and once
# backward (kernels/csrc/filter.h: a quarter, where few texts are alike). Pooling by the maximum has gathers of the best
# patches instead of products backward, 2/P of one, which is not counted.
PRODUCTS = {
    "clip": Products(useful=3, hardware=4, small=3),
    "siglip": Products(useful=3, hardware=3, small=3),
    "region": Products(useful=3, hardware=4.5, small=4),
    "patch max": Products(useful=1, hardware=1, small=1),
    "patch softmax": Products(useful=3, hardware=4, small=4),
}

ALONE = "dense, computed"
DENSE_BYTES = 2.5 * 4
"""Bytes a pair that OpenCLIP's ClipLoss keeps for backward: the peer's memory where it is too large to be run."""

# (loss, size, scale, peer) -> bounds on columns of a row: ratios are to be reached, MiB not to be exceeded.
GOALS: dict[tuple[str, str, float, str], dict[str, float]] = {
    ("clip", "8192×512", 14.3, "open_clip"): {"time_ratio": 2.0, "peak_ratio": 20},
    ("clip", "8192×512", 100.0, "open_clip"): {"time_ratio": 2.0, "peak_ratio": 20},
    ("clip", "65536×512", 14.3, ALONE): {"peak_mib": 1.5e9 / 2**20},
    ("siglip", "8192×512", 10.0, "open_clip"): {"time_ratio": 1.7, "peak_ratio": 20},
    ("region", "8192×512", 14.3, "dense, one product"): {"time_ratio": 3.0, "peak_ratio": 30},
    ("region", "8192×512", 14.3, "dense, two products"): {"time_ratio": 3.0, "peak_ratio": 30},
    ("patch max", "128×196×4×256", 14.0, "einsum"): {"time_ratio": 2.0, "peak_ratio": 30},
    ("patch softmax", "128×196×4×256", 14.0, "einsum"): {"time_ratio": 2.0, "peak_ratio": 30},
}


def comparisons(benchmarks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each of our measurements and each of its peers; ratios are peer / ours, above 1 is in our favour."""
    rows = []
    for benchmark in benchmarks:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        ours = info["memory"]
        for peer, measured in (info["peers"] or {ALONE: None}).items():
            theirs = measured["memory"] if measured else {"peak": DENSE_BYTES * info["size"][0] ** 2 / 2**20}
            row = {
                "loss": info["loss"],
                "size": size_of(info),
                "scale": info["scale"],
                "peer": peer,
                "rounds": stats["rounds"],
                "ms": 1e3 * stats["median"],
                "min_ms": 1e3 * stats["min"],
                "peer_ms": 1e3 * measured["median"] if measured else None,
                "peer_min_ms": 1e3 * measured["min"] if measured else None,
            }
            for kind in ("peak", "workspace", "sampled"):
                row[f"{kind}_mib"] = ours and ours[kind]
                row[f"peer_{kind}_mib"] = theirs and theirs.get(kind)
            for ratio, name in (("time_ratio", "ms"), ("peak_ratio", "peak_mib"), ("workspace_ratio", "workspace_mib")):
                row[ratio] = divided(row[f"peer_{name}"], row[name])
            goal = GOALS.get((row["loss"], row["size"], row["scale"], peer), {})
            row["goal"] = goal
            row["met"] = all(reached(row[name], name, bound) for name, bound in goal.items()) if goal else None
            rows.append(row)
    return rows


def size_of(info: dict[str, Any]) -> str:
    return "×".join(map(str, info["size"]))


def divided(peer: float | None, ours: float | None) -> float | None:
    return peer / ours if peer is not None and ours else None


def reached(value: float | None, name: str, bound: float) -> bool:
    return value is not None and (value <= bound if name.endswith("_mib") else value >= bound)


def product_limits(benchmarks: Iterable[dict[str, Any]], rate: float | None) -> list[dict[str, Any]]:
    """How far each of our measurements is from the time that its products alone would take at `rate` operations/s."""
    rows = []
    for benchmark in benchmarks:
        info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        size, products = info["size"], PRODUCTS[info["loss"]]
        pairs = size[0] ** 2 if len(size) == 2 else math.prod(size[:2]) * size[0] * size[2]
        product = 2 * pairs * size[-1]
        number = products.small if len(size) == 2 and size[0] <= SMALL_ROWS else products.hardware
        limit = number * product / rate if rate else None
        rows.append(
            {
                "loss": info["loss"],
                "size": size_of(info),
                "scale": info["scale"],
                "best_ratio": limit and best_ratio(info["peers"], limit),
                "ms": 1e3 * seconds,
                "useful_gflops": products.useful * product / seconds / 1e9,
                "products": number,
                "hardware_gflops": number * product / seconds / 1e9,
                "limit_ms": limit and 1e3 * limit,
                "percent_of_limit": limit and 100 * limit / seconds,
            }
        )
    return rows


def best_ratio(peers: dict[str, dict[str, Any]], limit: float) -> float | None:
    """The fastest eager peer's time / `limit`; None if there is none."""
    eager = [each["median"] for name, each in peers.items() if not name.startswith(COMPILED)]
    return min(eager) / limit if eager else None


def build(raw: dict[str, Any]) -> dict[str, Any]:
    """The report, from what pytest-benchmark wrote."""
    measured = [each for each in raw["benchmarks"] if "loss" in each["extra_info"]]
    squares = [each for each in measured if each["extra_info"]["loss"] == "matmul"]
    losses = [each for each in measured if each not in squares]
    rate = 2 * squares[0]["extra_info"]["size"][0] ** 3 / squares[0]["stats"]["median"] if squares else None
    return {
        **origin(raw),
        "matmul_size": squares[0]["extra_info"]["size"][0] if squares else None,
        "matmul_gflops": rate and rate / 1e9,
        "comparisons": comparisons(losses),
        "product_limits": product_limits(losses, rate),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    rate = report["matmul_gflops"]
    matmul = f"{report['matmul_size']}² fp32 product {rate:.0f} GFLOP/s" if rate else "matmul rate not measured"
    shares = [row["sampled_mib"] / row["peak_mib"] for row in report["comparisons"] if row["peak_mib"]]
    seen = (
        f" Seen from outside, every 2 ms, our peaks are {min(shares):.0%} to {max(shares):.0%} of these."
        if shares
        else ""
    )
    return f"""# Losses on a CPU, {report["date"]}

`{report["command"]}`, commit {report["commit"]}
({report["cpu"]}, {report["cores"]} cores, {report["threads"]} threads, torch {report["torch"]}, load average at start
{report["load"]:.2f}, {matmul})

Forward and backward, fp32, random unit-norm inputs, one process. Every round runs ours and each peer once, the order
reversed from round to round; times are medians (fastest in brackets). Memory is a fresh process's for each form: `peak`
above the inputs, `workspace` = peak less the gradients returned.{seen}
Ratios are peer / ours. Most of a `patch` row's peak is the gradient of the patches, in every form: compare workspaces.
`{ALONE}`: not run; 2.5 · N² floats, which OpenCLIP's ClipLoss keeps for backward.

{table(COMPARISON, map(comparison_cells, report["comparisons"]))}

## Distance from the product limit

A product is 2 · rows · columns · D operations. Useful: what the loss and its gradients need. Hardware: what our form
multiplies. Limit: the hardware's products alone, at the rate measured above; more than 100 % where our strips multiply
faster than that. `Best ratio`: the eager peer's time (the fastest form that is not compiled) / limit, which no streamed
form exceeds at that rate: it computes the scores again instead of keeping them, one product more than a dense form has.
What is lacking to 100 %: exponentials and sums, the filter's look at each bound, and threads that wait for each other.

{table(LIMIT, map(limit_cells, report["product_limits"]))}

{table(PRODUCT, ([loss, *(f"{number:g}" for number in each)] for loss, each in PRODUCTS.items()))}
"""


COMPARISON = (
    *("loss", "size", "scale", "peer", "ours, ms", "peer, ms", "time ratio"),
    *("peak MiB, ours / peer", "peak ratio", "workspace MiB, ours / peer", "workspace ratio", "goal"),
)
LIMIT = (
    "loss",
    "size",
    "scale",
    "ms",
    "useful GFLOP/s",
    "products",
    "hardware GFLOP/s",
    "limit, ms",
    "% of the limit",
    "best ratio",
)
PRODUCT = ("loss", "useful products", "hardware products", f"hardware, up to {SMALL_ROWS} rows")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def comparison_cells(row: dict[str, Any]) -> list[str]:
    def both(name: str) -> str:
        return f"{cell(row[name])} / {cell(row[f'peer_{name}'])}"

    bounds = (f"{name} {'≤' if name.endswith('_mib') else '≥'} {bound:.5g}" for name, bound in row["goal"].items())
    verdict = {None: "", True: ": met", False: ": **not met**"}[row["met"]]
    return [
        *(row["loss"], row["size"], f"{row['scale']:g}", row["peer"]),
        f"{cell(row['ms'])} ({cell(row['min_ms'])})",
        f"{cell(row['peer_ms'])} ({cell(row['peer_min_ms'])})",
        *(cell(row["time_ratio"], 2), both("peak_mib"), cell(row["peak_ratio"])),
        *(both("workspace_mib"), cell(row["workspace_ratio"])),
        ", ".join(bounds) + verdict,
    ]


def limit_cells(row: dict[str, Any]) -> list[str]:
    return [
        *(row["loss"], row["size"], f"{row['scale']:g}", cell(row["ms"]), cell(row["useful_gflops"])),
        *(f"{row['products']:g}", cell(row["hardware_gflops"]), cell(row["limit_ms"]), cell(row["percent_of_limit"])),
        cell(row["best_ratio"], 2),
    ]


def cell(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main("Tables from a run of the benchmarks.", "losses", build, markdown)
