"""Region-text retrieval as `cllip-fast eval` ranks it, both ways, against the whole matrix of scores in the same run.

    pytest benchmarks/test_evaluate.py --benchmark-only -s                          # add -m slow: the largest alone
    CLLIP_BENCH_SHRINK=16 pytest benchmarks/test_evaluate.py --benchmark-only -s    # a trial, all sizes divided by 16

As many regions as distinct texts; both forms must find the same recalls. A row's `extra_info` has texts a second, and
for both forms the time and the peak memory above the features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Peers
from benchmarks.peers import shrunk
from cllip_fast.evaluate.ranking import recall_at
from cllip_fast.evaluate.regions import region_text_retrieval
from tests.peak import measurable, peak_bytes

WIDTH = 512
DENSE = "whole matrix"


def make_features(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regions near their texts, texts, and the text of each region: some texts are of several regions, some of none."""
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1)
    text_of = torch.randint(count, (count,), generator=generator)
    noise = torch.randn(count, WIDTH, generator=generator) * (6 / WIDTH**0.5)
    return F.normalize(texts[text_of] + noise, dim=1), texts, text_of


def whole_matrix(regions: Tensor, texts: Tensor, text_of: Tensor) -> dict[str, float | None]:
    """The same recalls from all scores at once, one product for both ways."""
    scores = regions @ texts.T
    matches = text_of[:, None] == torch.arange(len(texts))
    counts = matches.sum(0)
    found = {}
    for way, values, right, weights in (("r2t", scores, matches, counts), ("t2r", scores.T, matches.T, None)):
        best = values.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        before = (values >= best) & ~right
        ranks = 1 + (before.sum(1) if weights is None else before.float() @ weights.float())
        queries = None if way == "r2t" else counts
        found |= {f"{way}_r{k}": recall_at(ranks, k, queries) for k in (1, 10)}
    return found


@pytest.mark.parametrize(
    ("count", "rounds", "dense"),
    [(2000, 7, True), (8000, 3, True), pytest.param(50_000, 1, False, marks=pytest.mark.slow)],
)
def test_region_text_retrieval(benchmark: Callable, count: int, rounds: int, dense: bool) -> None:
    inputs = make_features(shrunk(count))
    peers = {DENSE: lambda: whole_matrix(*inputs)} if dense else {}
    found = region_text_retrieval(*inputs)
    assert 0.02 < found["r2t_r1"] < found["r2t_r10"] < 1
    for peer in peers.values():
        assert peer() == pytest.approx(found, abs=1e-6)
    timed = Peers(peers)

    def ours() -> object:
        return region_text_retrieval(*inputs)

    benchmark.pedantic(ours, setup=timed.before, teardown=timed.after, rounds=rounds)
    seconds = {"tiles": benchmark.stats.stats.median}
    seconds |= {name: statistics.median(each) for name, each in timed.seconds.items()}
    forms = {"tiles": ours, **peers} if measurable() else {}
    memory = {name: round(peak_bytes(form) / 2**20, 1) for name, form in forms.items()}
    size = len(inputs[1])
    benchmark.extra_info.update(retrieval=[size, size, WIDTH], seconds=seconds, memory_mib=memory)
    benchmark.extra_info["texts_per_second"] = {name: round(size / each) for name, each in seconds.items()}
    for name, each in seconds.items():
        print(f"\n{size} × {size}, {name}: {each:.2f} s, {size / each:,.0f} texts/s, {memory.get(name)} MiB", end="")
