"""At which rank each query finds its first match, computed row tile by row tile.

Ties count against the query: an entry that is no match and scores as high as the best match stands before it, so that a
collapsed model, whose scores are all equal, reaches 0 % and not 100 %. Scores that are NaN count against it as well: a
match of NaN is not found at all, however small the gallery.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor

NEVER = torch.iinfo(torch.int64).max  # rank of a match that does not exist
TILE_ELEMENTS = 1 << 22  # scores held at once: 16 MiB in fp32
COLUMNS = 4096  # of a tile multiplied at once: a CPU's library copies what it multiplies, and for few rows no faster


@torch.no_grad()
def match_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_index: Tensor,
    gallery_index: Tensor,
    gallery_counts: Tensor | None = None,
    *,
    tile_elements: int = TILE_ELEMENTS,
) -> Tensor:
    """Rank (1 is first) of the best match of each query among the gallery's entries, by inner product.

    Args:
        queries: [Q, E] features.
        gallery: [G, E] features.
        query_index, gallery_index: [K] int64; the K pairs (query, entry) that match.
        gallery_counts: [G] int64, how many equal entries each row stands for; default 1. Several entries with the same
            text are thereby computed once and counted as often as they occur.
        tile_elements: at most this many scores are held at a time, one row of scores at least.

    Returns:
        [Q] int64: 1 + the number of entries that do not match and do not score below the best match; `NEVER` for a
        query that has no match, or one whose score is not finite.

    Raises:
        InputError: wrong shapes, indices out of range, or an empty gallery.
    """
    check_tensor("queries", queries, ("Q", "E"), floating=True)
    check_tensor("gallery", gallery, ("G", queries.shape[1]), floating=True, like=("queries", queries))
    check_tensor("query_index", query_index, ("K",), dtype=torch.int64)
    check_tensor("gallery_index", gallery_index, (len(query_index),), dtype=torch.int64)
    for name, index, side in (("query_index", query_index, queries), ("gallery_index", gallery_index, gallery)):
        if len(index) and not (index.min() >= 0 and index.max() < len(side)):
            raise InputError(f"{name} runs from {index.min()} to {index.max()}, expected 0 to {len(side) - 1}")
    if len(gallery) == 0:
        raise InputError("gallery has no rows, expected at least one entry")
    matches = torch.bincount(query_index, minlength=len(queries))
    if gallery_counts is None:
        gallery_counts = torch.ones(len(gallery), dtype=torch.int64, device=gallery.device)
    check_tensor("gallery_counts", gallery_counts, (len(gallery),), dtype=torch.int64)
    counts = gallery_counts.float()  # sums are exact up to 2^24, far beyond any rank that is asked for

    order = query_index.argsort()
    query_index, gallery_index = query_index[order], gallery_index[order]
    pair_ends = matches.cumsum(0).tolist()
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    rows = max(1, min(len(queries), tile_elements // len(gallery)))
    tile = queries.new_empty(rows, len(gallery))
    # Even parts: a last one of a single column would be rounded otherwise than the rest, and equal entries not tie.
    parts = -(-len(gallery) // COLUMNS)
    first_pair = 0
    for start in range(0, len(queries), rows):
        stop = min(start + rows, len(queries))
        scores = tile[: stop - start]
        for entries, columns in zip(gallery.tensor_split(parts), scores.tensor_split(parts, 1), strict=True):
            torch.mm(queries[start:stop], entries.T, out=columns)
        pairs = slice(first_pair, pair_ends[stop - 1])
        place = query_index[pairs] - start, gallery_index[pairs]
        first_pair = pairs.stop
        best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, place[0], scores[place], "amax")
        # In their own memory the scores become 1 for what stands before the best match, else 0. "Not below" rather than
        # "at least": comparisons with NaN are false, and NaN must not look like a first place.
        scores[place] = -torch.inf  # no match stands before another
        before = scores.lt_(best[:, None]).logical_not_()
        ranks[start:stop] = (1 + (before.float() @ counts).long()).where(best.isfinite(), NEVER)
    return ranks


def recall_at(ranks: Tensor, k: int, counts: Tensor | None = None) -> float | None:
    """Share of queries whose rank is at most `k`, each counted `counts` times (default once); None without queries."""
    if len(ranks) == 0:
        return None
    found = (ranks <= k).double()
    return float(found.mean() if counts is None else (found * counts).sum() / counts.sum())
