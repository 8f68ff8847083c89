"""What the GPU report runs: each loss in our form and in its peers' forms, and their inputs on any device.

A form maps the inputs to a loss. Making one raises ImportError if its package is not installed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import COMPILED, FILTER_THRESHOLD, OURS, POOL_TEMPERATURE, Case, Loss, make_inputs
from cllip_fast import extras
from cllip_fast.losses import ClipLoss, PatchTextLoss, RegionTextLoss, SigLipLoss
from cllip_fast.streaming.small import small_info_nce, small_sigmoid_loss
from tests import dense
from tests.openclip_peer import openclip_losses

PEER_PACKAGES = (
    *("open_clip_torch", "inf-cl", "memeff", "siglip-kernel", "late-interaction-kernels", "cut-cross-entropy"),
)

PLAIN = "plain PyTorch"
"""Our own dense form, which `auto` takes for few rows."""


def backend() -> str:
    """Ours: the kernels by name, as `auto` does not take them yet; in a dry run, what a CPU has."""
    return "triton" if torch.cuda.is_available() and extras.probe("triton") else "auto"


def inputs_on(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """`benchmarks.peers.make_inputs` on a device: features in `dtype`, scale and bias in fp32, all leaves."""
    return [each.detach().to(device, dtype if each.dim() else None).requires_grad_() for each in make_inputs(case)]


def versions() -> dict[str, str]:
    """Peer package -> version, of those that are installed."""
    found = {}
    for name in PEER_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        by_row, by_column = cal_flash_loss(images, texts, scale=scale), cal_flash_loss(texts, images, scale=scale)
        return (by_row.mean() + by_column.mean()) / 2

    return loss


def memeff(case: Case) -> Loss:
    """Its scale is a constant: it has no gradient for it."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / case.scale, normalized_inputs=True, stable=False)
    return lambda images, texts, scale: loss(images, texts)


def cut_cross_entropy(case: Case) -> Loss:
    """Without its gradient filter, which is on by default and drops small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(images), device=images.device)
        rows = linear_cross_entropy(scale.to(images.dtype) * images, texts, labels, filter_eps=None)
        return (rows + linear_cross_entropy(scale.to(images.dtype) * texts, images, labels, filter_eps=None)) / 2

    return loss


def linear_cross_entropy(case: Case) -> Loss:
    """PyTorch's own fused loss in its chunked, memory-saving mode (torch 2.12 and newer)."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("this PyTorch has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(images), device=images.device)
        rows = F.linear_cross_entropy(scale * images, texts, labels, options=options)
        return (rows + F.linear_cross_entropy(scale * texts, images, labels, options=options)) / 2

    return loss


def siglip_kernel(case: Case) -> Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda images, texts, scale, bias: fused_siglip_loss(images, texts, scale.log(), bias)


def dense_region(regions: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """One matrix of logits and its transpose; pairs whose texts are alike are left out."""
    unit = F.normalize(texts.detach(), dim=1)
    excluded = (unit @ unit.t() > FILTER_THRESHOLD).fill_diagonal_(False)
    logits = (scale * regions @ texts.t()).masked_fill(excluded, float("-inf"))
    labels = torch.arange(len(regions), device=regions.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def symmetric(logits: Tensor, each: int) -> Tensor:
    """InfoNCE over logits [images, texts], `each` texts an image; other texts of an image are no negatives."""
    images = torch.arange(len(logits), device=logits.device)
    owner = images.repeat_interleave(each)
    positive = logits[owner, torch.arange(len(owner), device=logits.device)]
    negatives = logits.masked_fill(owner == images[:, None], float("-inf"))
    losses = F.softplus(negatives.logsumexp(0) - positive) + F.softplus(negatives.logsumexp(1)[owner] - positive)
    return losses.mean() / 2


def einsum_max(patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    scores = torch.einsum("ipd,jd->ipj", patches, texts.flatten(0, 1)).amax(1)
    return symmetric(scale * scores.float(), texts.shape[1])


def einsum_softmax(patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    scores = torch.einsum("ipd,jd->ipj", patches, texts.flatten(0, 1)).float()
    pooled = (torch.softmax(scores / POOL_TEMPERATURE, 1) * scores).sum(1)
    return symmetric(scale * pooled, texts.shape[1])


def late_interaction(case: Case) -> Loss:
    """Its MaxSim gives the pooled scores; a text is a query of one token."""
    from late_interaction_kernels import maxsim

    def loss(patches: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return symmetric(scale * maxsim(texts.flatten(0, 1)[:, None], patches).t(), texts.shape[1])

    return loss


def compiled(loss: Loss) -> Callable[[Case], Loss]:
    return lambda case: torch.compile(loss, dynamic=False)


FORMS: dict[str, dict[str, Callable[[Case], Loss]]] = {
    "clip": {
        OURS: lambda case: ClipLoss(backend=backend()),
        PLAIN: lambda case: lambda *features: small_info_nce(*features, None, None),
        "open_clip": lambda case: openclip_losses().ClipLoss(),
        "inf-cl": inf_cl,
        "memeff": memeff,
        "cut-cross-entropy": cut_cross_entropy,
        "linear_cross_entropy": linear_cross_entropy,
        f"{COMPILED} dense": compiled(dense.clip),
    },
    "siglip": {
        OURS: lambda case: SigLipLoss(backend=backend()),
        PLAIN: lambda case: small_sigmoid_loss,
        "open_clip": lambda case: openclip_losses().SigLipLoss(),
        "siglip-kernel": siglip_kernel,
        f"{COMPILED} dense": compiled(dense.siglip),
    },
    "region": {
        OURS: lambda case: RegionTextLoss(filter_threshold=FILTER_THRESHOLD, backend=backend()),
        PLAIN: lambda case: lambda *features: small_info_nce(*features, None, FILTER_THRESHOLD),
        "dense": lambda case: dense_region,
        f"{COMPILED} dense": compiled(dense_region),
    },
    "patch max": {
        OURS: lambda case: PatchTextLoss(pool="max", backend=backend()),
        "einsum": lambda case: einsum_max,
        "late-interaction-kernels": late_interaction,
        f"{COMPILED} einsum": compiled(einsum_max),
    },
    "patch softmax": {
        OURS: lambda case: PatchTextLoss(pool="softmax", pool_temperature=POOL_TEMPERATURE, backend=backend()),
        "einsum": lambda case: einsum_softmax,
        f"{COMPILED} einsum": compiled(einsum_softmax),
    },
}
"""loss -> name -> a function of the case that makes the form; compiled forms come last, as they take longest."""
