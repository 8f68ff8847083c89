"""Peak memory of one forward and backward pass on a CPU. Each is measured in a process of its own (Linux only).

    python -m benchmarks.peak clip ours 14.3 8192 512     # loss, form, logit scale, size

The process first makes a small call, so that libraries and their buffers are there (a compiled form: the call itself,
as compilation would be counted otherwise), makes the inputs, gives freed memory back and resets its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.peers import COMPILED, FORMS, Case, make_inputs, step

_RESET = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002


def measurable() -> bool:
    """Whether this system reports a process's peak (Linux does)."""
    return _RESET.exists()


def peak_mib(case: Case, form: str) -> dict[str, float]:
    """Memory of one pass in a fresh process, with as many threads as this one has, in MiB.

    Returns:
        peak: the highest resident memory above that with the inputs.
        workspace: peak less the gradients that the pass returns.
        sampled: the peak as seen from this process, which looks every 2 ms; may miss a short one.

    Raises:
        CalledProcessError: the process failed.
    """
    size, threads = map(str, case.size), str(torch.get_num_threads())
    command = [sys.executable, "-m", __name__, case.loss, form, str(case.scale), *size, "--threads", threads]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        before = highest = int(process.stdout.readline() or 0)  # the pass begins
        while process.poll() is None:
            highest = max(highest, _resident(process.pid))
            time.sleep(_SAMPLE_SECONDS)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        measured = json.loads(process.stdout.read())
    measured["sampled"] = highest - before
    return {name: round(value / 2**20, 2) for name, value in measured.items()}


def _resident(process: int | str, field: str = "VmRSS") -> int:
    """Bytes; 0 for a process that has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("loss", choices=FORMS)
    parser.add_argument("form")
    parser.add_argument("scale", type=float)
    parser.add_argument("size", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = Case(args.loss, tuple(args.size), args.scale)
    loss = FORMS[case.loss][args.form]()
    # A compiled form is another one at another size.
    step(loss, make_inputs(case if args.form.startswith(COMPILED) else case.small()))()
    run = step(loss, make_inputs(case))

    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds would hide new allocations
    _RESET.write_text("5")  # the kernel's command to reset the peak to the present
    before = _resident("self")
    print(before, flush=True)
    _, *gradients = run()
    peak = _resident("self", "VmHWM") - before
    print(json.dumps({"peak": peak, "workspace": peak - sum(each.nbytes for each in gradients)}))


if __name__ == "__main__":
    main()
