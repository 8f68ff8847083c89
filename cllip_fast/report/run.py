"""A run's folder as the report needs it: options, figures, results, checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cllip_fast.data.folders import read_json
from cllip_fast.errors import InputError
from cllip_fast.show.curves import Series, read_log
from cllip_fast.train import checkpoint
from cllip_fast.train.config import Config

Metrics = dict[str, dict[str, float | None]]  # split -> metric -> value


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        folder: where.
        options: `config.json` as it is.
        config: the same as the trainer's own; options that this version no longer has are left out.
        training, splits: figures of the log (`read_log`); empty without one.
        step: of the results; None without any.
        metrics: the last evaluation's.
        seconds: that the run took, as far as `results.json` says.
        checkpoint: the newest; None where there is none yet.
    """

    folder: Path
    options: dict[str, Any]
    config: Config
    training: Series
    splits: dict[str, Series]
    step: int | None
    metrics: Metrics
    seconds: float | None
    checkpoint: Path | None


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        InputError: the folder has no config.json, or a file in it cannot be used.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, expected the folder of a run, such as runs/scenes")
    options = read_json(folder / "config.json")
    known = {field.name for field in fields(Config)}
    try:
        config = Config(**{name: value for name, value in options.items() if name in known})
    except (InputError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be used: {error}") from error
    log, results = folder / "log.jsonl", folder / "results.json"
    training, splits = read_log(log) if log.is_file() else ({}, {})
    record = read_json(results) if results.is_file() else {}
    step, metrics = record.get("step"), record.get("results") or {}
    if not isinstance(metrics, dict) or not all(isinstance(of, dict) for of in metrics.values()):
        raise InputError(f"{results} has results {metrics!r}, expected an object of metrics for each split")
    if not metrics:
        step, metrics = _last_evaluation(splits)
    stored = checkpoint.stored(folder / "checkpoints")
    return Run(
        folder, options, config, training, splits, step, metrics, record.get("seconds"), stored[-1] if stored else None
    )


def _last_evaluation(splits: dict[str, Series]) -> tuple[int | None, Metrics]:
    """The newest figures in the log, of a run that has not ended."""
    step = max((steps[-1] for series in splits.values() for steps, _ in series.values()), default=None)
    return step, {
        split: {name: values[-1] for name, (steps, values) in series.items() if steps[-1] == step}
        for split, series in splits.items()
    }
