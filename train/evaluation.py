"""The trainer's evaluations: every split shared by all ranks, a table at the end, and the pictures of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cllip_fast.data import Batch, Loader
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD
from cllip_fast.errors import InputError
from cllip_fast.evaluate import evaluate, table
from cllip_fast.models import CllipModel
from cllip_fast.show import picture_sheet, training_curves
from cllip_fast.train import parallel
from cllip_fast.train.checkpoint import writable
from cllip_fast.train.config import Config
from cllip_fast.train.distributed import World
from cllip_fast.train.inputs import Inputs
from cllip_fast.train.logs import RunLog
from cllip_fast.train.signals import StopRequest

Results = dict[str, dict[str, float | None]]


class Interrupted(Exception):
    """A rank was asked to stop: raised on all of them after the same batch."""


@dataclass
class Evaluation:
    """Evaluates on all ranks, each on its share of the images, as `cllip-fast eval` does; the main rank writes."""

    model: CllipModel
    inputs: Inputs
    config: Config
    world: World
    log: RunLog
    run: Path
    stop: StopRequest

    def evaluate(self, step: int) -> Results | None:
        """Metrics of each split, the same on all ranks, logged as they come; None if a rank was asked to stop."""
        return self._measure(parallel.unsharded(self.model), step)

    def finish(self, step: int, seconds: float) -> bool:
        """The last evaluation: table, results.json, a picture sheet of each split, curves. False if it was broken off.

        Raises:
            InputError: the folder cannot be written.
        """
        model = parallel.unsharded(self.model)
        results = self._measure(model, step)
        if results is not None and self.world.is_main:
            with writable(self.run):
                self._write(model.eval(), step, seconds, results)
        return results is not None

    def _measure(self, model: CllipModel, step: int) -> Results | None:
        results: Results = {}
        for name, loader in self.inputs.splits.items():
            try:
                results[name] = evaluate(
                    model, self._until_stopped(loader), tokenizer=self.inputs.tokenizer,
                    classes=self.inputs.info.classes, attributes=self.inputs.info.attributes,
                    text_length=self.config.text_length, region_length=self.config.region_length,
                    device=self.world.device, progress=self.world.is_main, group=self.world.group,
                )  # fmt: skip
            except Interrupted:
                by = self.stop.signal or "another rank"
                self.log.say(f"the evaluation of step {step} was broken off by {by}")
                return None
            self.log.write(step, {"split": name, **results[name]})
        if results:
            self.log.say(table(results, title=f"step {step}"))
        return results

    def _until_stopped(self, loader: Loader) -> Iterator[Batch]:
        """This rank's batches. After each the ranks vote, as often as the longest share has batches."""
        batches = iter(loader)
        for _ in range(0, loader.samples, self.config.batch_size * self.world.size):
            yield from islice(batches, 1)
            if self.world.any(bool(self.stop)):
                raise Interrupted

    def _write(self, model: CllipModel, step: int, seconds: float, results: Results) -> None:
        record = {"step": step, "seconds": round(seconds, 1), "results": results, "config": self.config.to_dict()}
        (self.run / "results.json").write_text(json.dumps(record, indent=1))
        written = ["results.json"]
        for name, loader in self.inputs.splits.items():
            for batch in islice(loader, 1):  # there is none where no image can be read
                picture_sheet(
                    model, batch, tokenizer=self.inputs.tokenizer, region_length=self.config.region_length,
                    mean=CLIP_MEAN, std=CLIP_STD, path=self.run / f"sheet_{name}.png",
                )  # fmt: skip
                written.append(f"sheet_{name}.png")
        try:
            training_curves(self.run / "log.jsonl", self.run / "curves.png")
            written.append("curves.png")
        except InputError as error:  # matplotlib is an extra: a run that has trained does not fail for its plot
            self.log.say(f"no curves: {error}")
        if not results:
            self.log.say("nothing was evaluated: name shards with --val-data name=shards")
        self.log.say(f"wrote {', '.join(written)} to {self.run}")
