"""Image-text retrieval: does an image find one of its captions, and a caption its image, among all of the split."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.evaluate.ranking import match_ranks, recall_at

DEPTHS = (1, 5, 10)


def image_text_retrieval(
    image_features: Tensor, text_features: Tensor, image_index: Tensor, text_index: Tensor
) -> dict[str, float | None]:
    """Recall at 1, 5 and 10 both ways, as on COCO and Flickr30k with several captions an image.

    An image has found its text when any of its captions is among the first k; each caption is a query for its image. A
    caption that several images share word for word is right for each of them. Ties count against the query (`ranking`).

    Args:
        image_features: [N, E].
        text_features: [T, E], one row for each distinct caption; rows that no image owns are neither asked nor found.
        image_index, text_index: [K] int64, one pair for each caption of each image.

    Returns:
        i2t_r1, i2t_r5, i2t_r10, t2i_r1, t2i_r5, t2i_r10 as shares in [0, 1]; None without captions. An image
        without any, where others have some, counts as one that did not find its text.
    """
    names = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in DEPTHS]
    if len(image_index) == 0:
        return dict.fromkeys(names)
    counts = torch.bincount(text_index, minlength=len(text_features))
    i2t = match_ranks(image_features, text_features, image_index, text_index, counts)
    t2i = match_ranks(text_features, image_features, text_index, image_index)
    return {f"i2t_r{k}": recall_at(i2t, k) for k in DEPTHS} | {f"t2i_r{k}": recall_at(t2i, k, counts) for k in DEPTHS}
