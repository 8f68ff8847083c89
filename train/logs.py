"""What a run says while it goes: a line a step interval, and every figure to the reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cllip_fast.train.config import Config
from cllip_fast.train.distributed import World
from cllip_fast.train.reports import Figures, Report, create_reports
from cllip_fast.train.speed import Speed, peak_memory

_SHORT = {"contrastive_loss": "clip", "grounding_loss": "ground", "localization_loss": "locate"}


def create_log(run: Path, config: Config, start: int, world: World) -> RunLog:
    """The log of the run in the folder `run`, which goes on after step `start`."""
    reports = create_reports(run, config, start) if world.is_main else []
    speed = Speed(config, world.size, world.device)
    return RunLog(reports, speed, steps=config.steps, start=start, main=world.is_main, device=world.device)


class RunLog:
    """Collects each step's figures and writes their mean at the interval's end; only the main rank writes.

    Tensors are summed where they are: reading them, which waits for a GPU, happens once an interval. A report that
    cannot be written is said once and tried again at the next interval: no training ends for it.
    """

    def __init__(
        self, reports: Sequence[Report], speed: Speed, *, steps: int, start: int, main: bool, device: torch.device
    ) -> None:
        self.reports, self.speed, self.steps, self.main, self.device = reports, speed, steps, main, device
        self.sums: dict[str, Tensor | float] = {}
        self.count, self.began = 0, time.perf_counter()
        self.failing: set[Report] = set()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if main else True, leave=False,
                        dynamic_ncols=True)  # fmt: skip

    def add(self, *, skipped: Tensor, data_seconds: float, **figures: Tensor) -> None:
        """Take one step's figures; those of a skipped step (1, else 0) are left out of the means."""
        figures = {name: value.detach().masked_fill(skipped > 0, 0) for name, value in figures.items()}
        for name, value in {**figures, "skipped": skipped, "data_seconds": data_seconds}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.bar.update()

    def flush(self, step: int, images_per_step: int, **last: float) -> None:
        """End the interval: print and write the means, and `last`, which are values of now."""
        sums = {name: float(value) for name, value in self.sums.items()}
        skipped, waited = sums.pop("skipped"), sums.pop("data_seconds")
        taken = self.count - skipped
        seconds = (time.perf_counter() - self.began) / self.count
        figures: Figures = {
            "percent": 100 * step / self.steps,
            **{name: value / taken if taken else float("nan") for name, value in sums.items()},
            **last,
            "skipped": int(skipped),
            "ms": 1000 * seconds,
            "images_per_s": images_per_step / seconds,
            "data_wait": waited / self.count / seconds,
            **self.speed.figures(step, seconds),
            "memory_gib": peak_memory(self.device),
            "seconds_left": seconds * (self.steps - step),
        }
        self.sums, self.count, self.began = {}, 0, time.perf_counter()
        self.write(step, figures)
        self.say(self._line(step, figures))

    def _line(self, step: int, of: dict[str, float]) -> str:
        parts = " ".join(
            f"{_SHORT.get(name, name.removesuffix('_loss'))} {value:.3f}"
            for name, value in of.items()
            if name.endswith("_loss")
        )
        used = f"MFU {100 * of['mfu']:.1f}%" if "mfu" in of else f"{1000 * of['tflops_per_s']:.3g} GFLOP/s"
        skipped = f" | {of['skipped']} SKIPPED" if of["skipped"] else ""
        return (
            f"step {step:>{len(str(self.steps))}}/{self.steps} {of['percent']:3.0f}%"
            f" | loss {of['loss']:.3f} ({parts}) | lr {of['lr']:.1e}"
            f" | scale {of['logit_scale']:.1f} {of['region_logit_scale']:.1f} | grad {of['grad_norm']:.2f}{skipped}"
            f" | {of['images_per_s']:.0f} img/s {of['ms']:.0f} ms, data {100 * of['data_wait']:.0f}%"
            f" | {used} | {of['memory_gib']:.1f} GiB | {timedelta(seconds=int(of['seconds_left']))} left"
        )

    def write(self, step: int, figures: Figures) -> None:
        """Write figures of a step to every report."""
        for report in self.reports:
            try:
                report.write(step, figures)
            except OSError as error:
                if report not in self.failing:
                    self.say(f"warning: {type(report).__name__} cannot be written: {error}; the run goes on")
                self.failing.add(report)
            else:
                self.failing.discard(report)

    def say(self, text: str) -> None:
        """Print on the main rank without tearing the progress bar; a full disk or a closed pipe does not matter."""
        if not self.main:
            return
        self.bar.clear()
        with suppress(OSError):
            print(text, flush=True)
        self.bar.refresh()

    def start_clock(self) -> None:
        """Call right before the first step: what came before is not its time."""
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done in here (an evaluation, a checkpoint) out of the step time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - start

    def close(self) -> None:
        self.bar.close()
        for report in self.reports:
            try:
                report.close()
            except OSError as error:
                self.say(f"warning: {type(report).__name__} cannot be closed: {error}")
        sys.stdout.flush()
