"""The trainer's evaluations: every split on the main rank, a table at the end, and the pictures of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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
    """The run was asked to stop: training ends by a vote of all ranks, an evaluation at the next batch."""


@dataclass
class Evaluation:
    """Evaluates the whole model on the main rank; the others wait, however long that takes."""

    model: CllipModel
    inputs: Inputs
    config: Config
    world: World
    log: RunLog
    run: Path
    stop: StopRequest

    def evaluate(self, step: int) -> Results | None:
        """Metrics of each split, logged as they come; None if the run was asked to stop meanwhile."""
        results: Results | None = {}
        model = parallel.unsharded(self.model, self.world)
        try:
            for name, loader in self.inputs.splits.items():
                results[name] = evaluate(
                    model, self._until_stopped(loader), tokenizer=self.inputs.tokenizer,
                    classes=self.inputs.info.classes, attributes=self.inputs.info.attributes,
                    text_length=self.config.text_length, region_length=self.config.region_length,
                    device=self.world.device,
                )  # fmt: skip
                self.log.write(step, {"split": name, **results[name]})
        except Interrupted:
            self.log.say(f"the evaluation of step {step} was broken off by {self.stop.signal}")
            results = None
        if results:
            self.log.say(table(results, title=f"step {step}"))
        self.world.barrier()
        return results

    def _until_stopped(self, loader: Loader) -> Iterator[Batch]:
        for batch in loader:
            if self.stop:
                raise Interrupted
            yield batch

    def finish(self, step: int, seconds: float) -> bool:
        """The last evaluation: table, results.json, a picture sheet of each split, curves. False if it was broken off.

        Raises:
            InputError: the folder cannot be written.
        """
        results = self.evaluate(step)
        if self.world.any(results is None):
            return False
        model = parallel.unsharded(self.model, self.world).eval()
        if self.world.is_main:
            with writable(self.run):
                self._write(model, step, seconds, results)
        return True

    def _write(self, model: CllipModel, step: int, seconds: float, results: Results) -> None:
        record = {"step": step, "seconds": round(seconds, 1), "results": results, "config": self.config.to_dict()}
        (self.run / "results.json").write_text(json.dumps(record, indent=1))
        written = ["results.json"]
        for name, loader in self.inputs.splits.items():
            path = self.run / f"sheet_{name}.png"
            picture_sheet(
                model,
                next(iter(loader)),
                tokenizer=self.inputs.tokenizer,
                region_length=self.config.region_length,
                mean=CLIP_MEAN,
                std=CLIP_STD,
                path=path,
            )
            written.append(path.name)
        try:
            training_curves(self.run / "log.jsonl", self.run / "curves.png")
            written.append("curves.png")
        except InputError as error:  # matplotlib is an extra: a run that has trained does not fail for its plot
            self.log.say(f"no curves: {error}")
        if not results:
            self.log.say("nothing was evaluated: name shards with --val-data name=shards")
        self.log.say(f"wrote {', '.join(written)} to {self.run}")
