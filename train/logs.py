"""What a run says while it goes: a line a step interval, every figure as JSONL, TensorBoard on request."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cllip_fast import extras

_SHORT = {"contrastive_loss": "clip", "grounding_loss": "ground", "localization_loss": "locate"}


class RunLog:
    """Collects each step's figures and writes their mean at the interval's end; only the main rank writes.

    Tensors are summed where they are: reading them, which waits for a GPU, happens once an interval.
    """

    def __init__(self, folder: Path, *, steps: int, start: int, tensorboard: bool, main: bool) -> None:
        self.main, self.steps = main, steps
        self.sums: dict[str, Tensor | float] = {}
        self.count, self.began = 0, time.perf_counter()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if main else True, leave=False,
                        dynamic_ncols=True)  # fmt: skip
        self.file = self.board = None
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._cut(folder / "log.jsonl", start)
        self.file = open(folder / "log.jsonl", "a")  # noqa: SIM115  (open for the length of the run)
        if tensorboard:
            extras.require("tensorboard", "--report-to tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    @staticmethod
    def _cut(path: Path, start: int) -> None:
        """Drop the lines of steps about to be repeated, so that a resumed log reads like an unbroken one."""
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start))

    def add(self, **figures: Tensor | float) -> None:
        """Take one step's figures."""
        for name, value in figures.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.bar.update()

    def flush(self, step: int, images_per_step: int, **last: float) -> dict[str, float]:
        """End the interval: return the means (and `last`, which are values of now), print and write them."""
        means = {name: float(value) / self.count for name, value in self.sums.items()} | last
        seconds = (time.perf_counter() - self.began) / self.count
        means |= {"ms": 1000 * seconds, "images_per_s": images_per_step / seconds}
        means["data_wait"] = means.pop("data_seconds", 0.0) / seconds
        self.sums, self.count, self.began = {}, 0, time.perf_counter()
        self.write(step, means)
        if self.main:
            self.say(self._line(step, means, seconds))
        return means

    def _line(self, step: int, means: dict[str, float], seconds: float) -> str:
        parts = " ".join(
            f"{_SHORT.get(name, name.removesuffix('_loss'))} {value:.3f}"
            for name, value in means.items()
            if name.endswith("_loss")
        )
        left = int(seconds * (self.steps - step))
        memory = f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        return (
            f"step {step:>{len(str(self.steps))}}/{self.steps} {100 * step / self.steps:3.0f}%"
            f" | loss {means['loss']:.3f} ({parts}) | lr {means['lr']:.1e}"
            f" | scale {means['logit_scale']:.1f} {means['region_logit_scale']:.1f} | grad {means['grad_norm']:.2f}"
            f" | {means['images_per_s']:.0f} img/s {means['ms']:.0f} ms, data {100 * means['data_wait']:.0f}%{memory}"
            f" | {left // 60}:{left % 60:02d} left"
        )

    def write(self, step: int, figures: dict[str, object]) -> None:
        """Write figures of a step to the JSONL file (and TensorBoard)."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step} | figures) + "\n")
        self.file.flush()
        if self.board is not None:
            prefix = f"{figures['split']}/" if "split" in figures else "train/"
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(prefix + name, value, step)
            self.board.flush()

    def say(self, text: str) -> None:
        """Print on the main rank without tearing the progress bar."""
        if self.main:
            self.bar.clear()
            print(text, flush=True)
            self.bar.refresh()

    def restart_clock(self) -> None:
        """Leave what was done since the last step (an evaluation, a checkpoint) out of the step time."""
        self.began = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()
        sys.stdout.flush()
