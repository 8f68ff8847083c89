"""Timing with the peers interleaved, peak memory beside it, and what a results file says about the machine."""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.peak import measurable, peak_mib
from benchmarks.peers import FORMS, OURS, Case, make_inputs, step

_LOAD = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOAD] = os.getloadavg()[0]  # before the benchmarks make it their own


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add to the results what `benchmarks/report.py` puts into its header."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    machine_info["cllip_fast"] = {
        "command": shlex.join(["pytest", *config.invocation_params.args]),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": config.stash[_LOAD],
    }


class Peers:
    """Times every peer once a round: before our turn in one round, after it and in reverse order in the next."""

    def __init__(self, steps: dict[str, Callable[[], object]]) -> None:
        self._steps = steps
        self._round = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}

    def before(self) -> None:
        if self._round % 2 == 0:
            self._run(self._steps)

    def after(self) -> None:
        if self._round % 2 == 1:
            self._run(reversed(self._steps))
        self._round += 1

    def _run(self, names: Iterable[str]) -> None:
        for name in names:
            start = time.perf_counter()
            self._steps[name]()
            self.seconds[name].append(time.perf_counter() - start)


@pytest.fixture
def compare(benchmark: Callable) -> Callable[..., None]:
    """compare(case, rounds, peers=None): time and peak memory of our form and of `peers` (None: all), forward and
    backward. Loss and gradients must be the same, so that nobody is faster by doing something else.
    """

    def run(case: Case, rounds: int, peers: Sequence[str] | None = None) -> None:
        makers, inputs = FORMS[case.loss], make_inputs(case)
        names = [name for name in makers if name != OURS] if peers is None else peers
        ours = step(makers[OURS](), inputs)
        others = {name: step(makers[name](), inputs) for name in names}
        if others:
            expected = ours()
            for name, other in others.items():
                for value, reference in zip(other(), expected, strict=True):
                    error = (value - reference).norm() / reference.norm()
                    assert error < 1e-3, f"{name} differs from our form: relative error {error:.1e}"
            del expected, value, reference
        else:
            step(makers[OURS](), make_inputs(case.small()))()  # a warm-up, where a whole pass takes minutes
        timed = Peers(others)
        benchmark.pedantic(ours, setup=timed.before, teardown=timed.after, rounds=rounds)
        memory = {name: peak_mib(case, name) if measurable() else None for name in (OURS, *names)}
        benchmark.extra_info.update(
            loss=case.loss,
            size=case.size,
            scale=case.scale,
            memory=memory[OURS],
            peers={
                name: {
                    "median": statistics.median(seconds),
                    "min": min(seconds),
                    "rounds": len(seconds),
                    "memory": memory[name],
                }
                for name, seconds in timed.seconds.items()
            },
        )

    return run
