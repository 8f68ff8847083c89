"""`ClipLoss`: OpenCLIP's contrastive loss, without its matrices."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.losses.inputs import check_pair, check_scalar, refuse_horovod, resolve_group, warn_once
from cllip_fast.streaming import check_backend, chunk_argument, info_nce


class ClipLoss(nn.Module):
    """Symmetric InfoNCE between images and texts (CLIP, arXiv 2103.00020, fig. 3); a drop-in for `open_clip.ClipLoss`.

    Value and gradients are OpenCLIP's for each pair of flags. Only `gather_with_grad=True` gives the gradient of the
    full-batch loss (averaged over ranks, as DDP does); for the other pairs a warning says so, once.

    Args:
        local_loss: each rank's loss is the mean over its own rows and columns, instead of over all ranks'.
        gather_with_grad: gradients also flow to the other ranks' features.
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: as OpenCLIP passes them; several ranks mean the default process group.
        use_horovod: refused if True.
        group: process group to use instead; rank and world size are read from it.
        backend: "auto", "triton", "native" or "torch".
        chunk_size: texts (over all ranks) that are worked on at a time; None: chosen.

    Raises:
        InputError: a back end that is not available, Horovod, or a world of another size.
    """

    def __init__(
        self,
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
        super().__init__()
        refuse_horovod(use_horovod)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.group, self.rank, self.world_size = resolve_group(group, rank, world_size)
        self.backend = check_backend(backend, "info_nce")
        self.chunk_size = chunk_argument(chunk_size)
        if self.world_size > 1 and not gather_with_grad:
            effect = "a wrong direction" if local_loss else "1 / world_size of its size"
            warn_once(
                f"local_loss={local_loss}, gather_with_grad=False: as in OpenCLIP, the encoders' gradient is not that "
                f"of the full batch (it has {effect}); gather_with_grad=True gives the true one"
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, [] in fp32 (fp64 for fp64 features), or {"contrastive_loss": it}.

        Args:
            image_features: [n, D], unit norm; n may change between calls.
            text_features: [n, D]; text i belongs to image i.
            logit_scale: [] or [1], already exponentiated.
            logit_bias: [] or [1]; a constant added to all logits changes no softmax, so its gradient is 0.
            output_dict: return a dict.

        Raises:
            InputError: shapes, types or devices that do not fit. NaN features are not looked for, which would stall a
                GPU: they give a NaN loss.
        """
        images, texts = check_pair(("image_features", image_features), ("text_features", text_features))
        loss = info_nce(images, texts, check_scalar("logit_scale", logit_scale, images), **self._settings())
        if logit_bias is not None:
            loss = loss + 0 * check_scalar("logit_bias", logit_bias, images).sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _settings(self) -> dict[str, str | bool | int]:
        return {
            "group": self.group,
            "local": self.local_loss and self.world_size > 1,
            "gather_grad": self.gather_with_grad,
            "chunk_size": self.chunk_size,
            "backend": self.backend,
        }
