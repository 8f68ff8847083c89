"""Collectives over one process group, chunk by chunk; one rank is the same code without communication.

    exchange = Exchange(group)               # a ProcessGroup, None (this process alone), or a name (see `group_name`)
    exchange.rank, exchange.world_size
    counts = exchange.row_counts(texts)      # rows on each rank; raises InputError if width or dtype differ
    ids = exchange.all_gather(ids, counts)   # [n, ...] -> [W, n_max, ...], short ranks padded with `fill`
    for start, chunk in exchange.gather_chunks(texts, counts, k):
        ...                                  # chunk [W, k, D]: rows start … start+k of each rank; the next is in flight
        pending = exchange.reduce_scatter(d) # [W, k, D] -> own [k, D], summed over ranks; in flight, in `wire`'s type
        ...
        own = pending.wait()
    exchange.all_sum(x); exchange.all_max(x) # small tensors, the same result on every rank

Nothing here is differentiable: the caller owns autograd. Rows of rank w that lie beyond `counts[w]` are zeros in a
gathered chunk; `padding_mask(counts, ...)` says which columns are real. With one rank the chunks are views of the
input and every call returns at once. A yielded chunk is valid until the generator is resumed: buffers are used in turn.

Every call is a collective: all ranks of the group must make the same calls in the same order. A rank that has raised
makes the others fail when the group's own timeout ends, as with any collective; one that has ended, at once (gloo).
"""

from cllip_fast.exchange.exchange import Exchange, Pending, padding_mask
from cllip_fast.exchange.groups import ALONE, WORLD, group_name

__all__ = ["ALONE", "WORLD", "Exchange", "Pending", "group_name", "padding_mask"]
