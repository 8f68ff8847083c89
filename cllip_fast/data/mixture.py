"""Which samples an epoch shows and in which order: one data set or several by weight, with or without replacement.

An epoch is as many samples as all data sets hold together.

    one data set      every sample once, shuffled
    weights           data set i fills its share of the epoch, exact up to one sample, at shuffled places. Its samples
                      come in passes that go on over the ends of epochs: none comes again before all of its set did
    resampled         every sample is drawn anew, with replacement: its data set by weight, then any sample of it

All is a function of (seed, epoch): of no worker, rank or batch size. Beside each sample stands how many passes over
its data set came before (of `resampled`: how many draws), which takes the epoch's place where crops and texts are
drawn: the same image twice in an epoch is not twice the same crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cllip_fast.errors import InputError

_PLACES, _DRAWS = 1, 2  # purposes of random numbers beside the passes' own


class Mixture:
    """The order of the samples of several data sets, numbered through in the order of the data sets."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, resampled: bool = False) -> None:
        """`sizes` and `weights`: samples in each data set, at least 1, and its share, positive, of any sum.

        Raises:
            InputError: an epoch is too short to hold one sample of a data set.
        """
        self._sizes, self._seed, self._resampled = np.array(sizes, dtype=np.int64), seed, resampled
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._samples = int(self._sizes.sum())
        self._shares = np.array(weights, dtype=np.float64) / np.sum(weights)
        self._counts = self._whole_counts()

    def __len__(self) -> int:
        return self._samples

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 [samples, 2]: for each place of the epoch the pass (see above) and the number of the sample."""
        return self._draw(epoch) if self._resampled else self._shuffle(epoch)

    def _shuffle(self, epoch: int) -> np.ndarray:
        owners = np.repeat(np.arange(len(self._sizes)), self._counts)
        if len(self._sizes) > 1:
            owners = np.random.default_rng([self._seed, epoch, 0, _PLACES]).permutation(owners)
        places = np.empty((self._samples, 2), dtype=np.int64)
        for data_set, count in enumerate(self._counts):
            places[owners == data_set] = self._passes(data_set, epoch * count, (epoch + 1) * count)
        return places

    def _passes(self, data_set: int, start: int, end: int) -> np.ndarray:
        """Places `start` to `end` of the endless row of a data set's passes, each a permutation of its own."""
        size, pieces = int(self._sizes[data_set]), []
        for number in range(start // size, (end - 1) // size + 1):
            order = np.random.default_rng([self._seed, number, data_set]).permutation(size)
            order = order[max(start - number * size, 0) : end - number * size]
            pieces.append(np.stack([np.full_like(order, number), order + self._firsts[data_set]], axis=1))
        return np.concatenate(pieces)

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch, 0, _DRAWS])
        owners = rng.choice(len(self._sizes), size=self._samples, p=self._shares)
        numbers = self._firsts[owners] + rng.integers(0, self._sizes[owners])
        return np.stack([epoch * self._samples + np.arange(self._samples), numbers], axis=1)

    def _whole_counts(self) -> list[int]:
        """Samples of each data set in an epoch: the shares rounded down, the rest to the largest fractions."""
        exact = self._shares * self._samples
        counts = np.floor(exact).astype(np.int64)
        rest = self._samples - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
        if not self._resampled and not counts.all():
            empty = int(np.argmin(counts))
            raise InputError(
                f"weights give data set {empty + 1} {self._shares[empty]:.2g} of an epoch of {self._samples} samples, "
                "expected at least one sample"
            )
        return counts.tolist()
