"""All losses of contrastive localized language-image pre-training, combined as in the paper."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_choice
from cllip_fast.exchange import group_name
from cllip_fast.losses.clip import ClipLoss
from cllip_fast.losses.grounding import GroundingLoss
from cllip_fast.losses.local_inputs import check_mask, check_weight
from cllip_fast.losses.localization import PatchLocalizationLoss
from cllip_fast.losses.patch_text import PatchTextLoss
from cllip_fast.losses.region_text import RegionTextLoss
from cllip_fast.streaming.global_mean import global_mean

# part -> its key in the result, and the arguments of `forward` that it cannot do without
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clip": ("contrastive_loss", ("image_features", "text_features", "logit_scale")),
    "region": ("region_loss", ("region_features", "region_text_features", "region_logit_scale")),
    "grounding": ("grounding_loss", ("predicted_boxes", "boxes")),
    "patch": ("patch_loss", ("patch_features", "region_text_features", "region_logit_scale")),
    "localization": (
        "localization_loss",
        ("patch_features", "region_text_features", "boxes", "region_logit_scale"),
    ),
}


class CllipLoss(nn.Module):
    """L_CLIP + λ [local_weight (L_region + L_ground) + patch_weight L_patch + localization_weight L_loc].

    λ = (images with at least one region) / (images), both of the global batch (arXiv 2410.02746, section 3.4; the patch
    losses are not the paper's). A batch without any region, on a rank or on all, works; in the latter case the total is
    exactly L_CLIP, its other parts 0 with a graph. On several ranks the value is the global batch's on each of them,
    and gradients averaged over ranks, as DDP does, are the global batch's.

    Args:
        losses: which parts, of "clip", "region", "grounding", "patch", "localization".
        local_weight: of the region and grounding losses.
        patch_weight, localization_weight: of those losses.
        filter_threshold: cosine above which two region texts are no negatives of each other in the region loss;
            None: no such filter.
        patch_filter_threshold: the same in the patch loss. None by default: texts of a fresh model are all alike, and
            such a filter would leave no negatives to learn from.
        use_region_ids: equal `region_ids` are no negatives of each other, in all local losses.
        pool, pool_temperature: of `PatchTextLoss`.
        grounding: "mse" or "l1_giou"; l1_weight, giou_weight: of the latter.
        other_images: of `PatchLocalizationLoss`.
        group: process group over which the batch is spread; None: this process alone.
        backend, chunk_size: of the contrastive losses.

    Raises:
        InputError: an unknown part, a part named twice, or an option that one of the parts refuses.
    """

    def __init__(
        self,
        losses: tuple[str, ...] = tuple(PARTS),
        *,
        local_weight: float = 1.0,
        patch_weight: float = 1.0,
        localization_weight: float = 1.0,
        filter_threshold: float | None = 0.9,
        patch_filter_threshold: float | None = None,
        use_region_ids: bool = True,
        pool: str = "max",
        pool_temperature: float = 0.1,
        grounding: str = "mse",
        l1_weight: float = 2.5,
        giou_weight: float = 1.0,
        other_images: bool = False,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(losses, str) or not losses:
            raise InputError(f"losses is {losses!r}, expected a tuple of some of {', '.join(PARTS)}")
        for name in losses:
            check_choice("losses", name, tuple(PARTS))
        if len(set(losses)) < len(losses):
            raise InputError(f"losses is {losses!r}, expected each part once")
        self.losses = tuple(name for name in PARTS if name in losses)
        self.group = group_name(group)
        self.use_region_ids = use_region_ids
        self.weights = {
            "region": check_weight("local_weight", local_weight),
            "grounding": check_weight("local_weight", local_weight),
            "patch": check_weight("patch_weight", patch_weight),
            "localization": check_weight("localization_weight", localization_weight),
        }
        streamed = {"group": group, "backend": backend, "chunk_size": chunk_size}
        make = {
            "clip": lambda: ClipLoss(gather_with_grad=True, **streamed),
            "region": lambda: RegionTextLoss(filter_threshold=filter_threshold, **streamed),
            "grounding": lambda: GroundingLoss(
                kind=grounding, l1_weight=l1_weight, giou_weight=giou_weight, group=group
            ),
            "patch": lambda: PatchTextLoss(
                pool=pool, pool_temperature=pool_temperature, filter_threshold=patch_filter_threshold, **streamed
            ),
            "localization": lambda: PatchLocalizationLoss(other_images=other_images, group=group),
        }
        self.parts = nn.ModuleDict({name: make[name]() for name in self.losses})

    def forward(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        region_features: Tensor | None = None,
        region_text_features: Tensor | None = None,
        patch_features: Tensor | None = None,
        predicted_boxes: Tensor | None = None,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        region_ids: Tensor | None = None,
        region_logit_scale: Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The total, a scalar; or its weighted parts by name, which sum to it.

        All arguments are what the model returns under the same names; those that no part needs may be left out.

        Args:
            image_features, text_features: [B, E] unit-norm.
            logit_scale: [] or [1], already exponentiated.
            region_features, region_text_features: [B, M, E] unit-norm.
            patch_features: [B, P, E] unit-norm.
            predicted_boxes, boxes: [B, M, 4] xyxy in [0, 1].
            region_mask: [B, M] bool, True for real regions; None: all are.
            region_ids: [B, M] int64, equal for equal texts; None: no text is known to equal another.
            region_logit_scale: as `logit_scale`, of the local losses; None: they share it.
            patch_grid: (rows, columns) of the patches; None: a square.
            output_dict: return a dict of contrastive_loss, region_loss, grounding_loss, patch_loss, localization_loss.

        Raises:
            InputError: a part's arguments are missing, or one has the wrong shape, type or device.
        """
        scale = logit_scale if region_logit_scale is None else region_logit_scale
        given = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "region_features": region_features,
            "region_text_features": region_text_features,
            "patch_features": patch_features,
            "predicted_boxes": predicted_boxes,
            "boxes": boxes,
            "region_logit_scale": scale,
        }
        self._check_given(given)
        ids = region_ids if self.use_region_ids else None
        arguments = {
            "clip": (image_features, text_features, logit_scale),
            "region": (region_features, region_text_features, scale, region_mask, ids),
            "grounding": (predicted_boxes, boxes, region_mask),
            "patch": (patch_features, region_text_features, scale, region_mask, ids),
            "localization": (patch_features, region_text_features, boxes, scale, region_mask, patch_grid, ids),
        }
        parts = {name: loss(*arguments[name]) for name, loss in self.parts.items()}
        if self.losses != ("clip",):
            share = self._share_with_regions(given, region_mask)
            for name, weight in self.weights.items():
                if name in parts:
                    parts[name] = parts[name] * (weight * share).to(parts[name].dtype)
        if output_dict:
            return {PARTS[name][0]: part for name, part in parts.items()}
        return sum(parts.values())

    def _check_given(self, given: dict[str, Tensor | None]) -> None:
        for name in self.losses:
            missing = [argument for argument in PARTS[name][1] if given[argument] is None]
            if missing:
                raise InputError(f"losses asks for {name!r}, which needs {', '.join(missing)}: not given")

    def _share_with_regions(self, given: dict[str, Tensor | None], region_mask: Tensor | None) -> Tensor:
        """λ, [] fp64: the same on every rank."""
        name = "boxes" if "grounding" in self.losses else "region_text_features"
        regions = given[name]
        with_regions = check_mask("region_mask", region_mask, (name, regions)).any(1)
        number = torch.full((), len(with_regions), dtype=torch.float64, device=regions.device)
        return global_mean(with_regions.sum(dtype=torch.float64), number, self.group)
