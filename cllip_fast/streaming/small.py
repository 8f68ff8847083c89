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

PLAIN_ROWS = {
    "cpu": {"info_nce": 256, "sigmoid": 256},
    "cuda": {"info_nce": 2048, "sigmoid": 1024},
}
"""Device -> operation -> rows up to which `auto` takes the plain form.

On a CPU, measured, it is the faster one up to about 500 rows and takes 0.7 of the dense loss's time; 256 keeps its
matrix at 256 KiB. On a GPU, predicted from counted launches and bytes (docs/kernels_info_nce.md) and not measured:
`benchmarks/gpu_report.py` prints the rows at which the two forms take the same time, which belong here.
"""


def plain_rows(operation: str, device: str) -> int:
    """Rows up to which `auto` takes the plain form of "info_nce" or "sigmoid" on a type of device."""
    return PLAIN_ROWS.get(device, PLAIN_ROWS["cpu"])[operation]


def is_small(operation: str, rows: Tensor, group: str, chunk_size: int, backend: str) -> bool:
    """Whether the plain form is the faster one; never if the caller chose a chunk or a back end."""
    automatic = group == ALONE and chunk_size == AUTO and backend == "auto"
    return automatic and 0 < rows.shape[0] <= plain_rows(operation, rows.device.type)


def small_info_nce(rows: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, threshold: float | None) -> Tensor:
    """`streaming.info_nce` without padding; stores a matrix of at most `PLAIN_ROWS`² scores."""
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
    """`streaming.sigmoid_loss`; stores matrices of at most `PLAIN_ROWS`² scores."""
    with plain_precision(rows):
        scores = _scores(rows, texts, scale)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        signs = torch.full_like(scores, -1.0).fill_diagonal_(1.0)
        return -F.logsigmoid(signs * scores).sum() / len(rows)


def _scores(rows: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    dtype = accumulation_dtype(rows.dtype)
    return (rows.to(dtype) * scale.to(dtype)) @ texts.to(dtype).t()
