"""Pairs (image, text) that are no negatives, because the image has an equal or similar text of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels.patch_text.tiling import ScoreBuffer, tile_spans
from cllip_fast.kernels.products import accumulation_dtype


def conflicts(
    own_valid: Tensor,
    columns: Tensor,
    own_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    own_texts: Tensor | None = None,
    threshold: float = 1.0,
) -> Tensor | None:
    """[B, t] bool, True where a valid text of image i equals text j by id, or has a cosine above `threshold` to it.

    Args:
        own_valid: [B, T] bool.
        columns: [t, D] texts in the products' type, of any length.
        own_ids, column_ids: [B, T], [t] integers; None: ids are not compared.
        own_texts: [B, T, D] texts of unit length in the products' type; None: no filter by cosine.

    Returns:
        None if neither is asked for.
    """
    if own_ids is None and own_texts is None:
        return None
    excluded = torch.zeros(own_valid.shape[0], columns.shape[0], dtype=torch.bool, device=columns.device)
    if own_valid.shape[1] == 0:
        return excluded
    dtype = accumulation_dtype(columns.dtype)
    buffer = ScoreBuffer(dtype)
    if own_texts is not None:
        # |column| on the right-hand side instead of a normalised copy of the columns.
        limits = torch.linalg.vector_norm(columns, dim=1, dtype=dtype).mul_(threshold)
    for images, span in tile_spans(*own_valid.shape, columns.shape[0], columns.is_cuda):
        valid = own_valid[images, :, None]
        if own_ids is not None:
            same = own_ids[images, :, None] == column_ids[span]
            excluded[images, span] |= same.logical_and_(valid).view(torch.uint8).amax(1).bool()
        if own_texts is not None:
            cosines = buffer.scores(own_texts[images], columns[span]).masked_fill_(~valid, float("-inf"))
            excluded[images, span] |= cosines.amax(1) > limits[span]
    return excluded
