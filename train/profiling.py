"""`--profile START:COUNT`: a Chrome trace of a few steps, with a named range for each part of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cllip_fast.errors import InputError
from cllip_fast.losses import CllipLoss
from cllip_fast.models import CllipModel
from cllip_fast.train.checkpoint import writable

ROWS = 25  # operators in the table beside the trace


class StepProfiler:
    """Traces `steps` of this process into `folder/trace_<first>-<last>.json.gz`, for chrome://tracing or Perfetto.

    Ranges "data" and "backward" are named where they happen; "forward" with its towers, "loss" with each part, and
    "optimizer" by hooks, which are there only while steps are traced. On a GPU ranges last as long as the CPU takes to
    launch their work; the trace has what the GPU did beside them.

    Args:
        steps: counted from 1; none: nothing happens.
        folder: of the run.
        start: the step after which the run goes on.
        say: prints.

    Raises:
        InputError: the run starts after the first of the steps.
    """

    def __init__(self, steps: range, folder: Path, start: int, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._say = steps, folder, say
        self._profile: profile | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._open: list[record_function] = []
        if not steps:
            return
        wait = steps[0] - start - 1
        if wait < 0:
            raise InputError(f"--profile starts at step {steps[0]}, but the run goes on after step {start}")
        warm_up = min(wait, 1)  # the profiler's own first step is slow
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(skip_first=wait - warm_up, wait=0, warmup=warm_up, active=len(steps), repeat=1),
            on_trace_ready=self._write,
        )

    def start(self, model: CllipModel, loss: CllipLoss, optimizer: torch.optim.Optimizer) -> None:
        """Begin with the next step."""
        if self._profile is None:
            return
        names: list[tuple[nn.Module, str]] = [(model, "forward"), (model.visual, "vision tower")]
        names += [(model.text, "text tower"), (loss, "loss")]
        names += [(module, f"loss: {name}") for name, module in loss.parts.items()]
        for module, name in names:
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._enter("optimizer")))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._leave()))
        self._profile.start()

    def step(self) -> None:
        """Call at the end of every step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Write what there is, if the run ends before the last of the steps."""
        if self._profile is not None:
            self._profile.stop()
        self._detach()

    def _enter(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def _leave(self) -> None:
        self._open.pop().__exit__(None, None, None)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._profile = [], None

    def _write(self, traced: profile) -> None:
        path = self._folder / f"trace_{self._steps[0]}-{self._steps[-1]}.json.gz"
        with writable(path):
            traced.export_chrome_trace(str(path))
            sort_by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = traced.key_averages().table(sort_by=sort_by, row_limit=ROWS, max_name_column_width=60)
            path.with_suffix("").with_suffix(".txt").write_text(table)
        self._say(f"{range_table(traced)}\nwrote {path.name} and its .txt to {self._folder}")


def range_table(traced: profile) -> str:
    """Calls and CPU milliseconds of each named range, as Markdown, in the order in which they first came."""
    spans: dict[str, list[float]] = defaultdict(list)
    for event in sorted(traced.events(), key=lambda event: event.time_range.start):
        if event.is_user_annotation and event.device_type == torch.autograd.DeviceType.CPU:
            spans[event.name].append(event.time_range.elapsed_us() / 1e3)
    rows = [f"| {name} | {len(each)} | {sum(each):.2f} |" for name, each in spans.items() if ":" not in name[:4]]
    return "\n".join(["| range | calls | CPU ms |", "| --- | ---: | ---: |", *rows])
