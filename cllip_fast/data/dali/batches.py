"""Batches decoded by DALI while the one before is used: runs fed in order, pictures taken out, failures repaired."""

from __future__ import annotations

import logging
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cllip_fast.data.assemble import Assembled
from cllip_fast.data.dali.encode import Encoded, Encoder, Run, stand_in_run
from cllip_fast.data.dali.pipeline import Settings, build, take
from cllip_fast.data.loader import work_ahead
from cllip_fast.data.order import EvaluationOrder, TrainingOrder

_log = logging.getLogger("cllip_fast.data")


@dataclass(eq=False)
class _Held:
    """A batch on its way through DALI: its runs still to be fed, and the pictures that came out."""

    assembled: Assembled
    runs: list[range]
    fed: int = 0
    pictures: list[Tensor] = field(default_factory=list)

    def is_complete(self) -> bool:
        return len(self.pictures) == len(self.runs)


class _Queue:
    """The batches under way, oldest first."""

    def __init__(self, batches: Iterator[Assembled], encoder: Encoder, settings: Settings) -> None:
        self._batches, self._encoder, self._settings = batches, encoder, settings
        self.held: deque[_Held] = deque()

    def next_run(self) -> Run:
        """The next run for DALI; StopIteration after the last batch."""
        while True:
            for held in self.held:
                if held.fed < len(held.runs):
                    held.fed += 1
                    return held.assembled.batch.run(held.runs[held.fed - 1], self._settings.side)
            assembled = next(self._batches)
            encoded = assembled.batch
            if encoded is not None and self._encoder.refused & encoded.for_dali():
                assembled = self._encoder[encoded.plan]  # a worker did not know that DALI refuses one of these
            self.held.append(self._hold(assembled))

    def awaited(self) -> _Held:
        """The batch that the next pictures are of; those before it hold no usable sample."""
        return next(held for held in self.held if not held.is_complete())

    def rebuild(self) -> None:
        """Make the awaited batch anew, and feed all that is held from its beginning."""
        place = self.held.index(self.awaited())
        self.held[place] = self._hold(self._encoder[self.held[place].assembled.batch.plan])
        for held in self.held:
            held.fed = 0
            held.pictures.clear()

    def _hold(self, assembled: Assembled) -> _Held:
        size = 0 if assembled.batch is None else len(assembled.batch)
        step = self._settings.run_size
        return _Held(assembled, [range(first, min(first + step, size)) for first in range(0, size, step)])


class DaliBatches:
    """Iterates over the batches of an order as `Assembled`, like the plain loader's `DataLoader`.

    Attributes:
        by_pillow: pictures handed over that Pillow decoded, by the reason.
    """

    def __init__(
        self,
        encoder: Encoder,
        order: TrainingOrder | EvaluationOrder,
        settings: Settings,
        workers: int,
        pin_memory: bool,
    ) -> None:
        self._encoder, self._settings, self._pin_memory = encoder, settings, pin_memory
        self._encoded = work_ahead(encoder, order, workers)
        self.by_pillow: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Assembled]:
        """Raises what the encoder raises, and RuntimeError if DALI itself fails, not over a picture."""
        queue = _Queue(iter(self._encoded), self._encoder, self._settings)
        # No cycles here. DALI's leave what they know of to the garbage collection, so they know the queue weakly: it
        # has the workers, which should stop at once. A pipeline in a cycle could be destroyed in a forked process,
        # where its threads are not, and hang.
        next_run = weakref.WeakMethod(queue.next_run)
        pipeline = build(self._settings, lambda: next_run()())
        while True:
            while queue.held and queue.held[0].is_complete():
                yield self._finish(queue.held.popleft())
            pipeline.schedule_run()
            try:
                pictures = take(pipeline, self._settings.device)
            except StopIteration:
                break
            except RuntimeError as error:
                self._find_refused(queue.awaited(), error)
                queue.rebuild()
                pipeline = build(self._settings, lambda: next_run()())
            else:
                queue.awaited().pictures.append(pictures)
        yield from map(self._finish, queue.held)  # batches without any usable sample

    def _finish(self, held: _Held) -> Assembled:
        """The batch with its pictures: DALI's memory where one run made it, else a copy."""
        encoded = held.assembled.batch
        if encoded is None:
            return held.assembled
        settings = self._settings
        images = held.pictures[0] if len(held.pictures) == 1 else torch.cat(held.pictures)
        if settings.channels_last:
            images = images.permute(0, 3, 1, 2)
        if encoded.rows:
            rows = torch.tensor(encoded.rows, device=images.device)
            images[rows] = encoded.squares.to(images)
        self.by_pillow.update(encoded.reasons)
        images, texts = images.to(settings.dtype), encoded.batch
        if self._pin_memory:
            images, texts = images if images.is_cuda else images.pin_memory(), texts.pin_memory()
        batch = replace(texts.to(settings.device, non_blocking=self._pin_memory), images=images)
        return held.assembled._replace(batch=batch)

    def _find_refused(self, held: _Held, error: RuntimeError) -> None:
        """Tell the encoder which pictures of the run that failed DALI refuses; raise `error` if it is none of them."""
        encoded, rows = held.assembled.batch, held.runs[len(held.pictures)]
        refused = self._refused(encoded, rows) if self._decodes(stand_in_run()) else set()
        if not refused:
            raise error
        _log.warning(
            "DALI refuses %d images of a batch, first %s; Pillow has the last word on them",
            len(refused),
            encoded.batch.keys[encoded.numbers.index(min(refused))],
        )
        self._encoder.refused |= refused

    def _refused(self, encoded: Encoded, rows: range) -> set[int]:
        """Numbers of the samples among `rows` that DALI refuses, by halves."""
        if self._decodes(encoded.run(rows, self._settings.side)):
            return set()
        if len(rows) == 1:
            return {encoded.numbers[rows.start]}
        middle = len(rows) // 2
        return self._refused(encoded, rows[:middle]) | self._refused(encoded, rows[middle:])

    def _decodes(self, run: Run) -> bool:
        pipeline = build(replace(self._settings, depth=1), lambda: run)
        pipeline.schedule_run()
        try:
            take(pipeline, self._settings.device)
        except RuntimeError:
            return False
        return True
