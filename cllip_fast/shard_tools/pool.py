"""Samples examined by several processes. One that a decoder brings down costs its own sample, not the check."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from cllip_fast.data.samples import Sample
from cllip_fast.data.shards import ShardReader
from cllip_fast.shard_tools.examine import Verdict, examine

_BATCH = 32


def examine_all(samples: Iterable[Sample], max_pixels: int, workers: int) -> Iterator[tuple[Sample, Verdict]]:
    """Each sample with its verdict, in order. 0 workers: all in this process, without protection from a crash."""
    batches = _batches(samples)
    if workers == 0:
        for batch in batches:
            yield from zip(batch, _examine_batch(batch, max_pixels), strict=True)
        return
    pool = _start(workers)
    waiting: deque[tuple[list[Sample], Future[list[Verdict]]]] = deque()
    try:
        while True:
            while len(waiting) < 4 * workers and (batch := next(batches, None)) is not None:
                waiting.append((batch, _submit(pool, batch, max_pixels)))
            if not waiting:
                return
            batch, future = waiting.popleft()
            try:
                verdicts = future.result()
            except BrokenProcessPool:  # which sample did it is unknown, and what was waiting is lost
                pool.shutdown()
                verdicts = [_examine_alone(sample, max_pixels) for sample in batch]
                pool = _start(workers)
                waiting = deque((lost, _submit(pool, lost, max_pixels)) for lost, _ in waiting)
            yield from zip(batch, verdicts, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Up to `_BATCH` samples of one shard at a time."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == _BATCH or sample.path != batch[0].path):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _examine_batch(batch: list[Sample], max_pixels: int) -> list[Verdict]:
    reader = ShardReader([batch[0].path])
    return [examine(sample, reader, max_pixels) for sample in batch]


def _examine_alone(sample: Sample, max_pixels: int) -> Verdict:
    with _start(1) as pool:
        try:
            return pool.submit(_examine_batch, [sample], max_pixels).result()[0]
        except BrokenProcessPool:
            return Verdict(False, [("broken image", "decoding it ended the process")])


def _start(workers: int) -> ProcessPoolExecutor:
    # A forked process is ready at once; a fresh one would import PyTorch first.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method))


def _submit(pool: ProcessPoolExecutor, batch: list[Sample], max_pixels: int) -> Future[list[Verdict]]:
    try:
        return pool.submit(_examine_batch, batch, max_pixels)
    except BrokenProcessPool as error:  # as if it had broken a moment later
        failed: Future[list[Verdict]] = Future()
        failed.set_exception(error)
        return failed
