"""Small problems on one rank: a few plain operations, where an operator's fixed costs would exceed the arithmetic's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.exchange import ALONE
from cllip_fast.kernels.products import accumulation_dtype
from cllip_fast.streaming.plan import AUTO
from cllip_fast.streaming.precision import plain_precision

SMALL_ROWS = 128
"""Up to this many rows the plain form is used: measured, the two take the same time at about 200 rows."""


def is_small(rows: Tensor, group: str, chunk_size: int, backend: str) -> bool:
    """Whether the plain form is the faster one; never if the caller chose a chunk or a back end."""
    return 0 < rows.shape[0] <= SMALL_ROWS and group == ALONE and chunk_size == AUTO and backend == "auto"


def small_info_nce(rows: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """`streaming.info_nce` without masks, the matrix of at most `SMALL_ROWS`² scores stored; one product instead of two."""
    with plain_precision(rows):
        dtype = accumulation_dtype(rows.dtype)
        scores = (rows.to(dtype) * scale.to(dtype)) @ texts.to(dtype).t()
        labels = torch.arange(rows.shape[0], device=rows.device)
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2
