"""`SigLipLoss`: OpenCLIP's pairwise sigmoid loss, without its matrices."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from cllip_fast.errors import check_choice
from cllip_fast.losses.inputs import check_pair, check_scalar, refuse_horovod, resolve_group
from cllip_fast.streaming import check_backend, chunk_argument, sigmoid_loss


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1); a drop-in for `open_clip.SigLipLoss`.

    Each rank's loss is the sum over its own images and all texts, divided by its number of images; averaging gradients
    over ranks, as DDP does, gives the full batch's.

    Args:
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: as OpenCLIP passes them; several ranks mean the default process group.
        dist_impl: "bidir", "shift", "reduce", "gather" or None: accepted for compatibility, all the same here.
        chunk_size: texts (over all ranks) that are worked on at a time; 0 or None: chosen.
        bidir, use_horovod: arguments of older releases; Horovod is refused.
        group: process group to use instead; rank and world size are read from it.
        backend: "auto", "triton", "native" or "torch".

    Raises:
        InputError: a back end that is not available, Horovod, or a world of another size.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = 0,
        *,
        bidir: bool = True,
        use_horovod: bool = False,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        refuse_horovod(use_horovod)
        check_choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.cache_labels = cache_labels
        self.group, self.rank, self.world_size = resolve_group(group, rank, world_size)
        self.backend = check_backend(backend, "sigmoid")
        self.chunk_size = chunk_argument(chunk_size)

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
            logit_bias: [] or [1]; None is 0.
            output_dict: return a dict.

        Raises:
            InputError: shapes, types or devices that do not fit. NaN features give a NaN loss.
        """
        images, texts = check_pair(("image_features", image_features), ("text_features", text_features))
        scale = check_scalar("logit_scale", logit_scale, images)
        bias = None if logit_bias is None else check_scalar("logit_bias", logit_bias, images)
        loss = sigmoid_loss(
            images, texts, scale, bias, group=self.group, chunk_size=self.chunk_size, backend=self.backend
        )
        return {"contrastive_loss": loss} if output_dict else loss
