"""One run on one GPU: its tests, then every loss against every peer that is installed. Under eight minutes.

    bash benchmarks/gpu_all.sh                       # installs the checkout first; arguments go on to this module
    python -m benchmarks.gpu_report                  # -> benchmarks/results/losses_<gpu>_<date>.{json,md}
    python -m benchmarks.gpu_report --dry-run        # the same control flow on a CPU at tiny sizes; claims nothing

Forward and backward in bf16 on random unit-norm features, one process. Every round runs each form once, the order
reversed from round to round; the L2 cache is overwritten before each turn; times are medians of CUDA events. Peak
memory is PyTorch's allocator's, above the inputs. Both files are written anew after every size, so that a run that is
cut short leaves what it has; a section whose seconds are spent is skipped, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_forms import FORMS, PLAIN, backend, inputs_on, versions
from benchmarks.peers import COMPILED, OURS, Case, Loss
from benchmarks.report import PRODUCTS, cell, size_of, table
from benchmarks.report_file import RESULTS
from cllip_fast import extras
from cllip_fast.streaming.small import plain_rows

SIZES = (
    *((rows, 512) for rows in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)),
    (65536, 768),
)
"""Rows, D."""
PLAIN_UP_TO = 8192
"""Rows at which our plain form is still tried, to find where the kernels become the faster ones."""
LARGEST = (2**20, 768)
"""Run once, for its memory."""
PATCHES = ((64, 256, 4, 512), (256, 256, 8, 512), (512, 196, 8, 512))
"""Images, patches, texts of an image, D."""
COMPILED_SIZES = {8192, 32768, 256}
"""Rows or images at which compiled forms run: each size is compiled anew."""
SECONDS = {
    **{"tests": 150, "matmul": 10, "clip": 75, "siglip": 55, "region": 55, "patch max": 40, "patch softmax": 40},
    "largest": 30,
}
TOTAL_SECONDS = 465
ROUNDS_SECONDS = 0.5
"""For the rounds of one form at one size, about; at least 5 rounds, at most 30."""
TESTS = ["-m", "pytest", "tests", "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider"]
HARDWARE = {loss: 6 if loss == "region" else products.hardware for loss, products in PRODUCTS.items()}
"""Products that ours runs; the conflict filter is a whole one there, forward and backward."""
SAME = 0.05
"""Largest relative difference from our loss and gradients with which a form still computes the same thing in bf16."""


@dataclass
class Row:
    """One form at one size. Times in ms, memory in MiB, rates in TFLOP/s; None: not measured, `note` says why."""

    loss: str
    size: str
    form: str
    scale: float
    ms: float | None = None
    min_ms: float | None = None
    rounds: int = 0
    peak_mib: float | None = None
    useful_tflops: float | None = None
    hardware_tflops: float | None = None
    percent_of_matmul: float | None = None
    times_ours: float | None = None
    difference: float | None = None
    note: str = ""


@dataclass
class Report:
    """All that has been measured so far, and the files that have it."""

    path: Path
    about: dict[str, Any]
    sections: dict[str, str] = field(default_factory=dict)
    matmul_tflops: float | None = None
    rows: list[Row] = field(default_factory=list)

    def write(self) -> None:
        """Both files; each is replaced whole."""
        contents = {name: value for name, value in dataclasses.asdict(self).items() if name != "path"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(contents, indent=1) + "\n"), (".md", self.markdown())):
            temporary = self.path.with_suffix(f"{suffix}.tmp")
            temporary.write_text(text)
            temporary.replace(self.path.with_suffix(suffix))

    def markdown(self) -> str:
        about = self.about
        rate = "not measured" if self.matmul_tflops is None else f"{self.matmul_tflops:.0f} TFLOP/s"
        warning = "**A dry run on a CPU: nothing here is a measurement.**\n\n" if about["dry_run"] else ""
        names = ("torch", "triton", "CUDA", "driver", "Python")
        software = ", ".join(f"{name} {about[name.lower()]}" for name in names)
        peers = ", ".join(f"{name} {version}" for name, version in about["peers"].items()) or "none installed"
        header = ("size", "form", "ms (fastest)", "form / ours", "peak MiB", "useful TFLOP/s", "hardware TFLOP/s")
        parts = [
            f"""# Losses on {about["device"]}, {about["date"]}

{warning}`{about["command"]}`, commit {about["commit"]}
({software}; peers: {peers}).

Ours: `backend="{about["backend"]}"`. Forward and backward, {about["dtype"]}, random unit-norm inputs, one process.
Rounds interleaved, the L2 cache overwritten before every turn, medians of CUDA events. Peak memory above the inputs, of
PyTorch's allocator. Useful: the products that a loss and its gradients need, 2 · rows · columns · D operations each;
hardware: those that ours runs (`HARDWARE`), also as a share of the rate of an 8192³ product in this run, {rate}.
Difference: the largest relative difference (Frobenius norm) from our value and gradients.

{table(("section", "outcome"), self.sections.items())}
"""
        ]
        limits = crossovers(self.rows)
        if limits:
            parts.append(
                "Rows up to which our plain form takes no longer than the kernels (`PLAIN_ROWS` in "
                f"`cllip_fast/streaming/small.py`):\n\n{table(('loss', 'rows'), limits.items())}\n"
            )
        for loss in dict.fromkeys(row.loss for row in self.rows):
            cells = [row_cells(row) for row in self.rows if row.loss == loss]
            parts.append(f"## {loss}\n\n{table((*header, '% of matmul', 'difference', 'note'), cells)}\n")
        return "\n".join(parts)


def row_cells(row: Row) -> list[str]:
    return [
        *(row.size, row.form, f"{cell(row.ms, 3)} ({cell(row.min_ms, 3)})", cell(row.times_ours, 2)),
        *(cell(row.peak_mib), cell(row.useful_tflops), cell(row.hardware_tflops), cell(row.percent_of_matmul)),
        *("–" if row.difference is None else f"{row.difference:.1e}", row.note),
    ]


class Device:
    """Times and memory on a GPU; on a CPU, for a dry run, the same calls with clocks that claim nothing."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        # Larger than the L2 of any GPU.
        self._flush = torch.empty(1 if dry_run else 2**28, dtype=torch.uint8, device=self.device)

    def time(self, run: Callable[[], object]) -> Callable[[], float]:
        """Run once behind a cold cache; call the result after `wait` for the ms."""
        self._flush.zero_()
        if self.dry_run:
            run()
            return lambda: math.nan
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[float]]:
        """Appends the MiB that the body took at most above what was allocated before."""
        found: list[float] = []
        if self.dry_run:
            yield found
            found.append(math.nan)
            return
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.append((torch.cuda.max_memory_allocated() - before) / 2**20)

    def empty_cache(self) -> None:
        if not self.dry_run:
            torch.cuda.empty_cache()


def step(loss: Loss, inputs: list[Tensor]) -> Callable[[], list[Tensor | None]]:
    """A function that runs forward and backward and returns the value and the gradients, None for one there is not."""

    def run() -> list[Tensor | None]:
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True)]

    return run


def difference(ours: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """The largest relative difference of two lists of tensors, over those that both have."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return max(((a - b).norm() / a.norm().clamp_min(1e-20)).item() for a, b in pairs)


def measure(case: Case, device: Device, dtype: torch.dtype, matmul: float | None, deadline: float) -> list[Row]:
    """A row for every form of a loss at one size; those that fail, or for which no time is left, say so."""
    inputs = inputs_on(case, device.device, dtype)
    rows, steps, ours = [], {}, None
    for name, make in FORMS[case.loss].items():
        if name == PLAIN and case.size[0] > PLAIN_UP_TO:
            continue
        row = Row(case.loss, size_of({"size": case.size}), name, case.scale)
        rows.append(row)
        if name.startswith(COMPILED) and case.size[0] not in COMPILED_SIZES and not device.dry_run:
            row.note = "not compiled at this size"
            continue
        if time.monotonic() > deadline:
            row.note = "skipped: no time left"
            continue
        try:
            run = step(make(case), inputs)
            result = run()
            if name == OURS:
                ours = result
            elif ours is not None:
                row.difference = difference(ours, result)
                row.note = "" if row.difference < SAME else "differs"
            del result
            with device.peak() as peak:
                run()
            row.peak_mib = peak[0]
            steps[name] = run
        except ImportError as error:
            row.note = f"not installed: {error}"
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as error:  # a peer fails in its own ways; the others are measured all the same
            row.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:200].replace("|", "/")
        device.empty_cache()
    for row, times in zip([row for row in rows if row.form in steps], rounds(steps, device, deadline), strict=True):
        if times:
            row.ms, row.min_ms, row.rounds = statistics.median(times), min(times), len(times)
    add_rates(rows, case, matmul)
    if device.dry_run:
        for row in rows:
            row.ms = row.min_ms = row.peak_mib = row.useful_tflops = row.hardware_tflops = None
            row.percent_of_matmul = row.times_ours = None
    return rows


def rounds(steps: dict[str, Callable], device: Device, deadline: float) -> list[list[float]]:
    """Times in ms of every form, round by round, until a form has had its seconds or the deadline has come."""
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    begin = time.monotonic()
    for number in range(2 if device.dry_run else 30):
        spent = time.monotonic() - begin
        enough = number >= 5 and spent > ROUNDS_SECONDS * len(steps)
        if enough or (number and time.monotonic() > deadline):
            break
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            pending[name].append(device.time(steps[name]))
        device.wait()
    return [[read() for read in reads] for reads in pending.values()]


def add_rates(rows: list[Row], case: Case, matmul: float | None) -> None:
    size, products = case.size, PRODUCTS[case.loss]
    pairs = size[0] ** 2 if len(size) == 2 else math.prod(size[:2]) * size[0] * size[2]
    tera = 2 * pairs * size[-1] / 1e12
    ours = next((row.ms for row in rows if row.form == OURS), None)
    for row in rows:
        if row.ms is None:
            continue
        row.times_ours = row.ms / ours if ours else None
        row.useful_tflops = products.useful * tera / row.ms * 1e3
        if row.form == OURS:
            row.hardware_tflops = HARDWARE[case.loss] * tera / row.ms * 1e3
            row.percent_of_matmul = 100 * row.hardware_tflops / matmul if matmul else None


def matmul_rate(device: Device, dtype: torch.dtype) -> float | None:
    """TFLOP/s of an 8192³ product of random numbers; None in a dry run."""
    size = 64 if device.dry_run else 8192
    left, right = (torch.randn(size, size, device=device.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    (times,) = rounds({"matmul": lambda: torch.mm(left, right, out=out)}, device, math.inf)
    return None if device.dry_run else 2 * size**3 / statistics.median(times[2:]) / 1e9


def run_tests(seconds: float, dry_run: bool) -> str:
    """The last line that the tests marked `gpu` print, or that their time was up."""
    command = [sys.executable, *(["-m", "pytest", "--version"] if dry_run else TESTS)]
    if not dry_run and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    root = Path(__file__).parents[1]
    # A process group of its own, so that the workers end with it.
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            print(output, flush=True)
            return f"stopped after {seconds:.0f} s"
    print(output, flush=True)
    return (output.strip().splitlines() or ["no output"])[-1].strip("= ").replace("|", "/")


def cases(loss: str, dry_run: bool) -> list[Case]:
    scale = 10.0 if loss == "siglip" else 14.3
    if loss.startswith("patch"):
        sizes = PATCHES if not dry_run else [(3, 4, 2, 16)]
    else:
        sizes = SIZES if not dry_run else [(plain_rows("info_nce", "cpu") + 1, 16)]
    return [Case(loss, size, scale) for size in sizes]


def about(device: Device, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what this runs."""
    return {
        "dry_run": args.dry_run,
        "date": args.date,
        "command": shlex.join(["python", "-m", "benchmarks.gpu_report", *sys.argv[1:]]),
        "commit": args.commit or output_of(["git", "rev-parse", "--short=12", "HEAD"]),
        "device": "a CPU" if args.dry_run else torch.cuda.get_device_name(device.device),
        "driver": output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "backend": backend(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": extras.probe("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peers": versions(),
    }


def output_of(command: list[str]) -> str:
    """The first line a command prints, or "unknown" if there is no such command or it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def run(args: argparse.Namespace) -> Report:
    """All sections, each as long as its seconds and those of the whole last."""
    end = time.monotonic() + args.seconds
    device, dtype = Device(args.dry_run), torch.float32 if args.dry_run else torch.bfloat16
    described = about(device, dtype, args)
    what, where = ("dryrun", "cpu") if args.dry_run else ("losses", described["device"].lower().replace(" ", "_"))
    report = Report(args.out / f"{what}_{where}_{args.date}", described)
    report.write()
    for section in args.only or SECONDS:
        deadline = min(end, time.monotonic() + SECONDS[section])
        left = deadline - time.monotonic()
        if left <= 0:
            report.sections[section] = f"skipped: all of the {args.seconds:g} s are spent"
        elif section == "tests":
            report.sections[section] = run_tests(left, args.dry_run)
        elif section == "matmul":
            report.matmul_tflops = matmul_rate(device, dtype)
            report.sections[section] = "done"
        elif section == "largest":
            report.rows.append(largest(device, dtype))
            report.sections[section] = report.rows[-1].note or "done"
        else:
            report.sections[section] = sweep(section, report, device, dtype, deadline)
        print(f"{section}: {report.sections[section]}", flush=True)
        report.write()
    return report


def largest(device: Device, dtype: torch.dtype) -> Row:
    """Ours at `LARGEST`, forward and backward once."""
    case = Case("clip", LARGEST if not device.dry_run else (300, 16), 14.3)
    row = Row(case.loss, size_of({"size": case.size}), OURS, case.scale)
    try:
        run = step(FORMS[case.loss][OURS](case), inputs_on(case, device.device, dtype))
        with device.peak() as peak:
            read = device.time(run)
            device.wait()
        if not device.dry_run:
            row.ms = row.min_ms = read()
            row.peak_mib = peak[0]
        row.rounds = 1
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    device.empty_cache()
    return row


def crossovers(rows: list[Row]) -> dict[str, str]:
    """loss -> up to how many rows the plain form takes no longer than ours, between the sizes that were measured."""
    found = {}
    for loss in dict.fromkeys(row.loss for row in rows):
        times = {(row.form, int(row.size.split("×")[0])): row.ms for row in rows if row.loss == loss and row.ms}
        sizes = sorted(size for form, size in times if form == PLAIN and (OURS, size) in times)
        ratios = [math.log(times[PLAIN, size] / times[OURS, size]) for size in sizes]
        if not sizes:
            continue
        if ratios[0] > 0:
            found[loss] = f"below {sizes[0]}"
        elif ratios[-1] <= 0:
            found[loss] = f"above {sizes[-1]}"
        else:
            above = next(index for index, ratio in enumerate(ratios) if ratio > 0)
            (low, high), (first, last) = (each[above - 1 : above + 1] for each in (ratios, sizes))
            found[loss] = f"{first * (last / first) ** (-low / (high - low)):.0f}"
    return found


def sweep(loss: str, report: Report, device: Device, dtype: torch.dtype, deadline: float) -> str:
    """All sizes of a loss, until the deadline; returns how it went."""
    torch.compiler.reset()
    skipped = []
    for case in cases(loss, device.dry_run):
        if time.monotonic() > deadline:
            skipped.append(size_of({"size": case.size}))
            continue
        report.rows += measure(case, device, dtype, report.matmul_tflops, deadline)
        report.write()
    return f"no time left for {', '.join(skipped)}" if skipped else "done"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="All losses against all peers on one GPU.")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU at tiny sizes, claiming nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two files")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="for the files and their names")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--only", choices=SECONDS, action="append", help="sections to run; default: all")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything together")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --dry-run tries the report out on a CPU")
    with torch.compiler.set_stance("force_eager") if args.dry_run else contextlib.nullcontext():
        report = run(args)
    print(report.markdown())
    print(f"wrote {report.path}.md and .json")
    sys.exit(any(row.form == OURS and row.note.startswith("failed") for row in report.rows))


if __name__ == "__main__":
    main()
