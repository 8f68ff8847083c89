"""What the benchmarks run: each loss in our form and in its peers' forms, and the inputs that all of them get.

A form maps the inputs to a loss. The compiled ones are `torch.compile` with its default back end (Inductor).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.losses import ClipLoss, PatchTextLoss, RegionTextLoss, SigLipLoss
from tests import dense
from tests.openclip_peer import openclip_losses

Loss = Callable[..., Tensor]

OURS = "ours"
COMPILED = "compiled"
"""How the names of compiled forms begin."""

FILTER_THRESHOLD = 0.9
POOL_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Case:
    """One loss at one size.

    Attributes:
        loss: a key of `FORMS`.
        size: (N, D), rows and width; of the patch losses (images, patches, texts of an image, D).
        scale: the logit scale.
    """

    loss: str
    size: tuple[int, ...]
    scale: float = 14.3

    def small(self) -> Case:
        """The same with few rows or images, enough for the streamed form."""
        return replace(self, size=(min(self.size[0], 512 if len(self.size) == 2 else 2), *self.size[1:]))


def shrunk(rows: int) -> int:
    """`rows`, or fewer if CLLIP_BENCH_SHRINK is set: its number divides every size, to try the suite out."""
    return max(2, rows // int(os.environ.get("CLLIP_BENCH_SHRINK", "1")))


def make_inputs(case: Case) -> list[Tensor]:
    """Leaves in fp32: unit-norm random features, the logit scale and, for the sigmoid loss, the bias."""
    generator = torch.Generator().manual_seed(0)

    def features(*shape: int) -> Tensor:
        return F.normalize(torch.randn(shape, generator=generator), dim=-1)

    if len(case.size) == 2:
        local, texts = features(*case.size), features(*case.size)
    else:
        images, patches, each, width = case.size
        local, texts = features(images, patches, width), features(images, each, width)
    if case.loss == "region":
        half = len(texts) // 2
        texts[half : 2 * half] = texts[:half].clone()  # every text twice, so that the filter has work
    scalars = [case.scale, -10.0] if case.loss == "siglip" else [case.scale]
    return [each.requires_grad_() for each in (local, texts, *map(torch.tensor, scalars))]


def step(loss: Loss, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs forward and backward and returns the loss and the gradient of every input."""

    def run() -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return run


def compiled(loss: Loss) -> Loss:
    """`loss` as one graph for the sizes it is first called with; graphs of earlier cases are dropped."""
    torch.compiler.reset()
    return torch.compile(loss, fullgraph=True, dynamic=False)


def two_linear_cross_entropies(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Rows against texts and texts against rows with PyTorch's own fused loss, in its chunked, memory-saving mode."""
    labels = torch.arange(len(images))
    options = torch.nn.LinearCrossEntropyOptions()
    by_row = F.linear_cross_entropy(scale * images, texts, labels, options=options)
    return (by_row + F.linear_cross_entropy(scale * texts, images, labels, options=options)) / 2


def conflicts(texts: Tensor) -> Tensor:
    """[R, R] bool: pairs whose texts' cosine exceeds the threshold, but for the positives."""
    unit = F.normalize(texts.detach(), dim=1)
    return (unit @ unit.t() > FILTER_THRESHOLD).fill_diagonal_(False)


def region_one_product(regions: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """`tests.dense.region` without a mask: one matrix of logits and its transpose."""
    logits = (scale * regions @ texts.t()).masked_fill(conflicts(texts), float("-inf"))
    labels = torch.arange(len(regions))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def region_two_products(regions: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Written as OpenCLIP writes its ClipLoss: a product for each direction."""
    excluded = conflicts(texts)
    logits_per_region = (scale * regions @ texts.t()).masked_fill(excluded, float("-inf"))
    logits_per_text = (scale * texts @ regions.t()).masked_fill(excluded, float("-inf"))
    labels = torch.arange(len(regions))
    return (F.cross_entropy(logits_per_region, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def patch_text_max(patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The patch–text loss with all scores at once, pooled by their maximum."""
    return _symmetric(scale * torch.einsum("ipd,jd->ipj", patches, texts.flatten(0, 1)).amax(1), texts.shape[1])


def patch_text_softmax(patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The same, pooled by a softmax over the patches."""
    scores = torch.einsum("ipd,jd->ipj", patches, texts.flatten(0, 1))
    return _symmetric(scale * (torch.softmax(scores / POOL_TEMPERATURE, 1) * scores).sum(1), texts.shape[1])


def _symmetric(logits: Tensor, each: int) -> Tensor:
    """InfoNCE over logits [images, texts], `each` texts an image; other texts of an image are no negatives."""
    images = torch.arange(len(logits))
    owner = images.repeat_interleave(each)
    positive = logits[owner, torch.arange(len(owner))]
    negatives = logits.masked_fill(owner == images[:, None], float("-inf"))
    losses = F.softplus(negatives.logsumexp(0) - positive) + F.softplus(negatives.logsumexp(1)[owner] - positive)
    return losses.mean() / 2


FORMS: dict[str, dict[str, Callable[[], Loss]]] = {
    "clip": {
        OURS: ClipLoss,
        "open_clip": lambda: openclip_losses().ClipLoss(),
        "compiled dense": lambda: compiled(dense.clip),
    },
    "siglip": {
        OURS: SigLipLoss,
        "open_clip": lambda: openclip_losses().SigLipLoss(),
        "compiled dense": lambda: compiled(dense.siglip),
    },
    "region": {
        OURS: lambda: RegionTextLoss(filter_threshold=FILTER_THRESHOLD),
        "dense, one product": lambda: region_one_product,
        "dense, two products": lambda: region_two_products,
        "compiled dense": lambda: compiled(region_one_product),
    },
    "patch max": {
        OURS: lambda: PatchTextLoss(pool="max"),
        "einsum": lambda: patch_text_max,
        "compiled einsum": lambda: compiled(patch_text_max),
    },
    "patch softmax": {
        OURS: lambda: PatchTextLoss(pool="softmax", pool_temperature=POOL_TEMPERATURE),
        "einsum": lambda: patch_text_softmax,
        "compiled einsum": lambda: compiled(patch_text_softmax),
    },
}
"""loss -> name -> a function that makes the form: none is loaded or compiled before it is wanted."""

if hasattr(F, "linear_cross_entropy"):  # torch 2.12 and newer
    FORMS["clip"]["linear_cross_entropy"] = lambda: two_linear_cross_entropies
