from __future__ import annotations

import pytest
import torch

from cllip_fast.errors import InputError
from cllip_fast.evaluate.ranking import COLUMNS, NEVER, match_ranks, recall_at
from tests.peak import measurable, peak_bytes


def naive_ranks(scores: list[list[float]], matches: list[set[int]], counts: list[int]) -> list[int]:
    """By sorting a list of (score, is a match) for each query, matches after others of the same score."""
    ranks = []
    for row, right in zip(scores, matches, strict=True):
        entries = [(-s, j in right) for j, s in enumerate(row) for _ in range(1 if j in right else counts[j])]
        ranks.append(1 + next(place for place, (_, is_match) in enumerate(sorted(entries)) if is_match))
    return ranks


@pytest.mark.parametrize(("queries", "gallery"), [(1, 1), (17, 5), (5, 123), (123, 17)])
def test_ranks_agree_with_sorting(queries: int, gallery: int) -> None:
    # Small integers: products are exact, so ties are real and the naive computation sees the same scores.
    a = torch.randint(-2, 3, (queries, 4)).float()
    b = torch.randint(-2, 3, (gallery, 4)).float()
    counts = torch.randint(1, 4, (gallery,))
    relevant = torch.rand(queries, gallery) < 0.2
    relevant[torch.arange(queries), torch.randint(gallery, (queries,))] = True
    pairs = relevant.nonzero()[torch.randperm(int(relevant.sum()))]
    expected = naive_ranks((a @ b.T).tolist(), [set(row.nonzero()[:, 0].tolist()) for row in relevant], counts.tolist())
    for tile_elements in (1, 2 * gallery + 1, 1 << 20):
        ranks = match_ranks(a, b, pairs[:, 0], pairs[:, 1], counts, tile_elements=tile_elements)
        assert ranks.tolist() == expected


def test_ties_count_against_the_query() -> None:
    ranks = match_ranks(torch.ones(3, 2), torch.ones(4, 2), torch.arange(3), torch.arange(3))
    assert ranks.tolist() == [4, 4, 4]


@pytest.mark.parametrize("entries", [COLUMNS, COLUMNS + 1, 2 * COLUMNS + 1])
def test_equal_entries_tie_wherever_they_stand(entries: int) -> None:
    """The gallery is multiplied in parts, and a library may round a narrow one otherwise."""
    queries, entry = (torch.nn.functional.normalize(torch.randn(n, 127), dim=1) for n in (33, 1))
    for match in (torch.randint(entries, (33,)), torch.full((33,), entries - 1)):
        ranks = match_ranks(queries, entry.repeat(entries, 1), torch.arange(33), match)
        assert ranks.tolist() == [entries] * 33


def test_nan_is_never_found() -> None:
    """However small the gallery: one entry would otherwise be at rank 1, and five within the first ten."""
    queries, gallery = torch.eye(3), torch.eye(3)
    queries[1, 1] = torch.nan
    assert match_ranks(queries, gallery, torch.arange(3), torch.arange(3)).tolist() == [1, NEVER, 1]
    gallery[2] = torch.nan  # an entry that is no match stands before those that are
    assert match_ranks(queries[:1], gallery, torch.tensor([0]), torch.tensor([0])).tolist() == [2]
    nothing = torch.full((1, 3), torch.nan)
    assert match_ranks(nothing, nothing, torch.tensor([0]), torch.tensor([0])).tolist() == [NEVER]


@pytest.mark.skipif(not measurable(), reason="this system does not report a process's peak memory")
def test_one_tile_of_scores_is_held() -> None:
    """The whole matrix would be 64 MiB, a tile is 8."""
    size, tile = 4096, 1 << 21
    features = torch.nn.functional.normalize(torch.randn(size, 8), dim=1)
    texts = torch.randint(size, (size,))
    counts = texts.bincount(minlength=size)

    def rank(queries: int) -> None:
        some = torch.arange(queries)
        match_ranks(features[:queries], features, some, texts[:queries], counts, tile_elements=tile)

    rank(1)  # libraries and their buffers
    assert peak_bytes(lambda: rank(size)) < 2 * 4 * tile


def test_the_best_of_several_matches_counts() -> None:
    gallery = torch.tensor([[1.0], [4.0], [3.0], [2.0]])
    ranks = match_ranks(torch.ones(1, 1), gallery, torch.tensor([0, 0]), torch.tensor([0, 2]))
    assert ranks.tolist() == [2]


def test_a_query_without_a_match_never_finds_it() -> None:
    ranks = match_ranks(torch.eye(3), torch.eye(3)[:2], torch.tensor([0]), torch.tensor([0]), torch.tensor([1, 4]))
    assert ranks.tolist() == [1, NEVER, NEVER]


def test_recall_weighs_queries_by_their_counts() -> None:
    ranks = torch.tensor([1, 6, 2])
    assert recall_at(ranks, 1) == pytest.approx(1 / 3)
    assert recall_at(ranks, 5, torch.tensor([1, 3, 4])) == pytest.approx(5 / 8)
    assert recall_at(ranks[:0], 1) is None


def test_bad_input_is_named() -> None:
    x, index = torch.ones(2, 3), torch.arange(2)
    with pytest.raises(InputError, match="gallery has no rows"):
        match_ranks(x, x[:0], index[:0], index[:0])
    with pytest.raises(InputError, match="gallery_index runs from 1 to 2, expected 0 to 1"):
        match_ranks(x, x, index, index + 1)
    with pytest.raises(InputError, match=r"gallery has shape \[2, 4\]"):
        match_ranks(x, torch.ones(2, 4), index, index)
