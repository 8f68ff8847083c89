"""Programs that tests start: none outlives its test, and a test waits for none without end.

torchrun's workers are in sessions of their own. Where torchrun alone is killed they go on, and hold the pipe that their
output goes to: who then reads it to its end waits for as long as they live.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import psutil
import pytest


def launch(command: list[str], **options: object) -> subprocess.Popen[str]:
    """Start a program, with standard output and errors in one pipe."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def output_of(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """What a program prints until it ends; one that does not end fails the test, and is killed."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        pytest.fail(f"not over after {timeout} s; it printed\n{kill(process)}")


def kill(process: subprocess.Popen[str]) -> str:
    """Kill a program and all that it has started; what it had printed."""
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += psutil.Process(process.pid).children(recursive=True)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    return process.communicate(timeout=60)[0]


def wait_for_lines(log: Path, count: int, process: subprocess.Popen[str], timeout: float = 240) -> None:
    """Wait until the running program has written so many lines to its log."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"{log} has no {count} lines; the program printed\n{kill(process)}")
