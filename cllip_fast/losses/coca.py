"""`CoCaLoss`: OpenCLIP's contrastive captioning loss; its contrastive half without the matrices."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.errors import check_tensor
from cllip_fast.losses.clip import ClipLoss


class CoCaLoss(ClipLoss):
    """Weighted `ClipLoss` and caption cross-entropy (CoCa, arXiv 2205.01917, eq. 4); drop-in for `open_clip.CoCaLoss`.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two; a contrastive weight of 0 skips its computation.
        pad_id: label that the caption loss ignores.
        The others are `ClipLoss`'s.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        flags = (local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        super().__init__(*flags, group=group, backend=backend, chunk_size=chunk_size)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.pad_id = pad_id

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, caption) losses, weighted, or {"contrastive_loss", "caption_loss"}.

        Args:
            image_features, text_features, logit_scale: as in `ClipLoss`.
            logits: [n, T, V] caption logits.
            labels: [n, T] int64 token ids.
            output_dict: return a dict.

        Raises:
            InputError: shapes, types or devices that do not fit.
        """
        check_tensor("logits", logits, ("N", "T", "V"), floating=True)
        check_tensor("labels", labels, tuple(logits.shape[:2]), like=("logits", logits))
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        else:
            clip_loss = logits.new_zeros(())
        caption_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad_id)
        caption_loss = caption_loss * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss
