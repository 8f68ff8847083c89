"""`DistillClipLoss`: OpenCLIP's contrastive loss with distillation from a teacher, without their matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.losses.clip import ClipLoss
from cllip_fast.losses.inputs import check_pair, check_scalar
from cllip_fast.streaming import distill


class DistillClipLoss(ClipLoss):
    """`ClipLoss` and the cross-entropy of the student's similarities against the teacher's softmax, in one walk.

    A drop-in for `open_clip.DistillClipLoss`; arguments are those of `ClipLoss`. The teacher is a constant.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, distillation) losses, or {"contrastive_loss", "distill_loss"}.

        Args:
            image_features, text_features, logit_scale: the student's, as in `ClipLoss`.
            dist_image_features, dist_text_features: the teacher's, [n, D'].
            dist_logit_scale: the teacher's, [] or [1], already exponentiated.
            output_dict: return a dict.

        Raises:
            InputError: shapes, types or devices that do not fit, or teacher features that require gradients.
        """
        images, texts = check_pair(("image_features", image_features), ("text_features", text_features))
        teacher = check_pair(("dist_image_features", dist_image_features), ("dist_text_features", dist_text_features))
        if len(teacher[0]) != len(images):
            raise InputError(f"dist_image_features has {len(teacher[0])} rows, but image_features has {len(images)}")
        if teacher[0].device != images.device:
            raise InputError(f"dist_image_features is on {teacher[0].device}, but image_features is on {images.device}")
        if torch.is_grad_enabled() and any(each.requires_grad for each in teacher):
            raise InputError("dist_image_features and dist_text_features must not require gradients: detach them")
        common = torch.promote_types(images.dtype, teacher[0].dtype)
        scale = check_scalar("logit_scale", logit_scale, images)
        dist_scale = check_scalar("dist_logit_scale", dist_logit_scale, images).detach()
        contrastive, distillation = distill(
            images.to(common),
            texts.to(common),
            scale,
            *(each.to(common) for each in teacher),
            dist_scale,
            **self._settings(),
        )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distillation}
        return contrastive, distillation
