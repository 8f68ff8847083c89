"""All metrics of a split, from one pass over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from cllip_fast.data.batch import Batch
from cllip_fast.errors import InputError
from cllip_fast.evaluate.features import collect
from cllip_fast.evaluate.grounding import grounding_metrics
from cllip_fast.evaluate.pointing import pointing_metrics
from cllip_fast.evaluate.ranks import gather_split
from cllip_fast.evaluate.regions import Attributes, classify, recognition, region_text_retrieval
from cllip_fast.evaluate.retrieval import image_text_retrieval
from cllip_fast.evaluate.texts import TextBook, Tokenizer
from cllip_fast.models.cllip import CllipModel


@torch.no_grad()
def evaluate(
    model: CllipModel,
    loader: Iterable[Batch],
    *,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    attributes: Attributes | None = None,
    text_length: int,
    region_length: int,
    device: torch.device | str | None = None,
    progress: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float | None]:
    """Evaluate a model on one split.

    The model is put into evaluation mode and back. It runs under the caller's autocast; metrics are computed in fp32.

    Args:
        model: a bare `CllipModel`, not one wrapped for distributed training.
        loader: yields each image of the split once; with a group, this rank's share of them.
        tokenizer: texts to token ids.
        classes: phrases to recognise regions as. Regions with other phrases are left out of the recognition only.
        attributes: phrase -> attribute -> value, for the recognition's accuracy per attribute.
        text_length, region_length: tokens of captions, and of phrases and classes.
        device: where the model is; default: that of its parameters.
        progress: show a bar on the terminal.
        group: the ranks that share the split; all return the same. None: this process alone.

    Returns:
        images, regions: how many were evaluated. Then shares in [0, 1] (IoU: mean), None where the split has nothing to
        count or the model cannot: i2t_r1/r5/r10, t2i_r1/r5/r10, recognition_top1, recognition_mean_class,
        recognition_<attribute>, r2t_r1/r10, t2r_r1/r10, grounding_acc50/iou, referring_acc50/iou, pointing. The modules
        of this package define each.

    Raises:
        InputError: `classes` holds a phrase twice.
    """
    if len(set(classes)) != len(classes):
        twice = next(phrase for i, phrase in enumerate(classes) if phrase in classes[:i])
        raise InputError(f"classes holds {twice!r} twice, expected distinct phrases")
    device = next(model.parameters()).device if device is None else torch.device(device)
    captions = TextBook(model, tokenizer, text_length, device)
    phrases = TextBook(model, tokenizer, region_length, device)
    phrases.number(classes)  # the classes come first, so that a phrase's number is its class

    was_training = model.training
    model.eval()
    try:
        split = collect(model, loader, captions, phrases, device=device, progress=progress)
        texts = [(list(book.numbers), book.features().cpu()) for book in (captions, phrases)]
    finally:
        model.train(was_training)
    split, caption_features, phrase_features = gather_split(split, *texts, group)

    with torch.autocast("cpu", enabled=False):
        metrics: dict[str, float | None] = {
            "images": float(len(split.image_features)),
            "regions": float(len(split.region_features)),
        }
        metrics |= image_text_retrieval(split.image_features, caption_features, split.caption_image, split.caption_text)
        labels = split.region_phrase.where(split.region_phrase < len(classes), -1)
        recognisable = labels >= 0
        if recognisable.any():
            predicted = classify(split.region_features[recognisable], phrase_features[: len(classes)])
        else:
            predicted = torch.empty(0, dtype=torch.int64)
        metrics |= recognition(predicted, labels[recognisable], classes, attributes)
        metrics |= region_text_retrieval(split.region_features, phrase_features, split.region_phrase)
    return metrics | grounding_metrics(split.iou, split.own_iou) | pointing_metrics(split.hit)
