"""Small problems on one rank: a few plain operations, where an operator's fixed costs would exceed the arithmetic's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.exchange import ALONE
from cllip_fast.kernels.block import Block
from cllip_fast.kernels.products import accumulation_dtype, operand
from cllip_fast.streaming.plan import AUTO
from cllip_fast.streaming.precision import plain_precision

SMALL_ROWS = 256
"""Up to this many rows the plain form is used. On a CPU it is the faster one up to about 500 rows, and takes 0.7 of the
dense loss's time; 256 keeps its matrix at 256 KiB.
"""


def is_small(rows: Tensor, group: str, chunk_size: int, backend: str) -> bool:
    """Whether the plain form is the faster one; never if the caller chose a chunk or a back end."""
    return 0 < rows.shape[0] <= SMALL_ROWS and group == ALONE and chunk_size == AUTO and backend == "auto"


def small_info_nce(rows: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, threshold: float | None) -> Tensor:
    """`streaming.info_nce` without padding; stores a matrix of at most `SMALL_ROWS`² scores."""
    with plain_precision(rows):
        scores = _scores(rows, texts, scale)
        if ids is not None or threshold is not None:
            fixed = operand(texts.detach())
            names = None if threshold is None else fixed
            block = Block((0, 0, len(rows)), row_ids=ids, column_ids=ids, row_texts=names, threshold=threshold or 0.0)
            scores = scores.masked_fill(block.excluded(0, len(rows), fixed), float("-inf"))
        labels = torch.arange(len(rows), device=rows.device)
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2


def small_sigmoid_loss(rows: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`streaming.sigmoid_loss`; stores matrices of at most `SMALL_ROWS`² scores."""
    with plain_precision(rows):
        scores = _scores(rows, texts, scale)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        signs = torch.full_like(scores, -1.0).fill_diagonal_(1.0)
        return -F.logsigmoid(signs * scores).sum() / len(rows)


def _scores(rows: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    dtype = accumulation_dtype(rows.dtype)
    return (rows.to(dtype) * scale.to(dtype)) @ texts.to(dtype).t()
