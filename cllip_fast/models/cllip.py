"""The CLLIP model: CLIP's two towers and the Prompter, behind its public verbs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_choice, check_tensor
from cllip_fast.models.checks import check_boxes, check_image_tokens, check_text, values_at_hand
from cllip_fast.models.config import ModelConfig
from cllip_fast.models.prompter import ImageMemory, Prompter
from cllip_fast.models.roi_align import roi_align
from cllip_fast.models.text import TextTower
from cllip_fast.models.text_ids import hash_multipliers, text_ids
from cllip_fast.models.vision import VisionTower

PARTS = ("region", "grounding", "patch")
TOWERS = ("visual.", "text.", "logit_scale")  # the beginnings of the parameters that CLIP has
MAX_LOGIT_SCALE = math.log(100)


class CllipModel(nn.Module):
    """Image tower, text tower, Prompter (or RoIAlign), and two temperatures.

    An image is encoded once, by `image_tokens`; every other image verb takes those tokens. Boxes are xyxy in [0, 1] of
    the image as it was fed. `normalize=True` gives rows of unit length. `logit_scale` and `region_logit_scale` are the
    logarithms of the inverse temperatures, shape [], from ln(1/0.07); the latter is None when the two are shared.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        self.prompter = Prompter(config) if config.region == "prompter" else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        scale = None if config.share_logit_scale else nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_parameter("region_logit_scale", scale)
        self.register_buffer("_id_multipliers", hash_multipliers(config.text_length), persistent=False)

    @property
    def local_logit_scale(self) -> Tensor:
        """The logit scale [] of the losses on regions and patches: their own, or the shared one."""
        return self.logit_scale if self.region_logit_scale is None else self.region_logit_scale

    # Public verbs

    def image_tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to tokens [B, T, W] before pooling and projection; T = P, or 1 + P with a class token.

        Raises:
            InputError: not a floating-point tensor of that shape, S being the model's image size.
        """
        size = self.config.image_size
        check_tensor("images", images, ("B", 3, size, size), floating=True, like=("the model", self.logit_scale))
        return self.visual(images)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, S, S] to features [B, E]."""
        features = self.pool_image(self.image_tokens(images))
        return F.normalize(features, dim=-1) if normalize else features

    def pool_image(self, image_tokens: Tensor) -> Tensor:
        """Image tokens [B, T, W] to features [B, E]: class token, or mean over the patches, normed and projected."""
        check_image_tokens(image_tokens, self.config)
        if self.config.class_token:
            image_tokens = image_tokens[:, :1]
        return self.visual.pool_normed(self.visual.norm_out(image_tokens))

    def encode_patches(self, image_tokens: Tensor, normalize: bool = False) -> Tensor:
        """Image tokens [B, T, W] to patch features [B, P, E], by the pooled feature's own norm and projection."""
        check_image_tokens(image_tokens, self.config)
        features = self.visual.project(self._normed_patches(image_tokens))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L], padded with 0, to features [B, E]. L may be anything up to the model's text length.

        Raises:
            InputError: wrong shape or type, texts too long, or (on a CPU, where looking is cheap) ids out of range.
        """
        check_text("text", text, ("B", "L"), self.config, like=self.logit_scale)
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_regions(self, image_tokens: Tensor, boxes: Tensor, normalize: bool = False) -> Tensor:
        """Image tokens [B, T, W] and boxes [B, M, 4] to region features [B, M, E], by the Prompter or by RoIAlign.

        RoIAlign samples the patches after the final norm, before the projection: no parameters of its own, and a box
        around the whole image gives exactly the image feature of a model that pools by the mean.

        Raises:
            InputError: wrong shapes, or (on a CPU) boxes outside [0, 1].
        """
        check_image_tokens(image_tokens, self.config)
        check_boxes(boxes, image_tokens)
        memory = self.prompter.remember(image_tokens) if self.prompter is not None else None
        return self._encode_regions(image_tokens, memory, boxes, normalize)

    def ground(self, image_tokens: Tensor, text_features: Tensor) -> Tensor:
        """Image tokens [B, T, W] and text features [B, K, E] from `encode_text` to boxes [B, K, 4], xyxy in [0, 1].

        The length of the text features does not matter; x0 <= x1 and y0 <= y1 always hold.

        Raises:
            InputError: wrong shapes, or a model built with region="roi_align", which has no grounding head.
        """
        check_image_tokens(image_tokens, self.config)
        batch = len(image_tokens)
        shape = (batch, "K", self.config.embed_dim)
        check_tensor("text_features", text_features, shape, floating=True, like=("image_tokens", image_tokens))
        prompter = self._require_prompter()
        return prompter.predict_boxes(prompter.remember(image_tokens), text_features)

    def forward(
        self,
        images: Tensor,
        text: Tensor,
        boxes: Tensor | None = None,
        region_text: Tensor | None = None,
        region_mask: Tensor | None = None,
        *,
        parts: tuple[str, ...] = (),
    ) -> dict[str, Tensor | tuple[int, int]]:
        """Everything `CllipLoss` asks for, under its argument names; the image is encoded once.

        Args:
            images: [B, 3, S, S].
            text: [B, L] token ids, one caption an image.
            boxes: [B, M, 4] xyxy in [0, 1]; zeros where padded.
            region_text: [B, M, Lr] token ids; zeros where padded.
            region_mask: [B, M] bool, True for real regions; None: all are.
            parts: which of "region", "grounding", "patch" to compute beside CLIP's own features.

        Returns:
            image_features, text_features [B, E], logit_scale [] (exponentiated). With any part also
            region_text_features [B, M, E], region_ids [B, M], boxes, region_mask, region_logit_scale [] (likewise).
            "region": region_features [B, M, E]; "grounding": predicted_boxes [B, M, 4]; "patch": patch_features
            [B, P, E] and patch_grid (h, w). Features have unit length. Padded regions hold finite values of no meaning.

        Raises:
            InputError: an unknown part, a part without boxes and region texts, or any wrong shape or type.
        """
        for part in parts:
            check_choice("parts", part, PARTS)
        tokens = self.image_tokens(images)
        check_tensor("text", text, (len(images), "L"))
        output: dict[str, Tensor | tuple[int, int]] = {
            "image_features": F.normalize(self.pool_image(tokens), dim=-1),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if not parts:
            return output
        if boxes is None or region_text is None:
            raise InputError(f"parts {', '.join(parts)} need boxes and region_text, got None")
        check_boxes(boxes, images)
        count = boxes.shape[1]
        check_text("region_text", region_text, (len(images), count, "Lr"), self.config, like=self.logit_scale)
        if region_mask is None:
            region_mask = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        check_tensor("region_mask", region_mask, (len(images), count), dtype=torch.bool)

        region_text_features = self._encode_region_texts(region_text)
        output |= {
            "region_text_features": region_text_features,
            "region_ids": text_ids(region_text, self._id_multipliers),
            "region_mask": region_mask,
            "boxes": boxes,
            "region_logit_scale": self.local_logit_scale.exp(),
        }
        memory = None
        if self.prompter is not None and ("region" in parts or "grounding" in parts):
            memory = self.prompter.remember(tokens)
        if "region" in parts:
            output["region_features"] = self._encode_regions(tokens, memory, boxes, normalize=True)
        if "grounding" in parts:
            output["predicted_boxes"] = self._require_prompter().predict_boxes(memory, region_text_features)
        if "patch" in parts:
            output["patch_features"] = self.encode_patches(tokens, normalize=True)
            output["patch_grid"] = self.config.patch_grid
        return output

    # Training helpers

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keep both temperatures' scales within [1, 100]; call after each optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.region_logit_scale is not None:
            self.region_logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def freeze_unused(self, parts: tuple[str, ...]) -> list[str]:
        """Freeze the parameters that `forward` with these parts does not touch; returns their names.

        DistributedDataParallel waits for a gradient of each parameter that is not frozen.
        """
        unused: tuple[str, ...] = ()
        if "region" not in parts and "patch" not in parts:
            unused += ("region_logit_scale",)
        if "region" not in parts:
            unused += ("prompter.corner_type", "prompter.project.")
        if "grounding" not in parts:
            unused += ("prompter.text_prompt.", "prompter.box_head.")
        if "region" not in parts and "grounding" not in parts:
            unused += ("prompter.",)
        frozen = []
        for name, parameter in self.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)
                frozen.append(name)
        return frozen

    def describe(self) -> str:
        """One line: parameters by part, tokens, image size."""
        config = self.config
        counts = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in (("vision", self.visual), ("text", self.text), ("prompter", self.prompter))
            if module is not None
        }
        by_part = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
        total = sum(p.numel() for p in self.parameters())
        rows, columns = config.patch_grid
        tokens = f"{rows}×{columns} patches" + (" + class token" if config.class_token else "")
        return (
            f"{config.name}: {total / 1e6:.2f} M parameters ({by_part}), {config.image_size} px images to {tokens}, "
            f"texts up to {config.text_length} of {config.vocab_size} tokens, {config.embed_dim} dimensions, "
            f"regions by {config.region}, attention {config.attention}, norm {config.norm}"
        )

    # Insides

    def _normed_patches(self, image_tokens: Tensor) -> Tensor:
        return self.visual.norm_out(image_tokens[:, self.visual.extra_tokens :])

    def _encode_regions(
        self, image_tokens: Tensor, memory: ImageMemory | None, boxes: Tensor, normalize: bool
    ) -> Tensor:
        if self.prompter is not None:
            features = self.prompter.region_features(memory, boxes)
        else:
            pooled = roi_align(self._normed_patches(image_tokens), boxes, self.config.patch_grid)
            features = self.visual.project(pooled)
        return F.normalize(features, dim=-1) if normalize else features

    def _encode_region_texts(self, region_text: Tensor) -> Tensor:
        """Token ids [B, M, Lr] to unit features [B, M, E]; equal texts are encoded once where finding them is free."""
        rows, which = region_text.flatten(0, 1), None
        if values_at_hand(rows):
            rows, which = rows.unique(dim=0, return_inverse=True)
        features = F.normalize(self.text(rows), dim=-1)
        return (features if which is None else features[which]).unflatten(0, region_text.shape[:2])

    def _require_prompter(self) -> Prompter:
        if self.prompter is None:
            raise InputError("grounding needs the Prompter, but the model was built with region='roi_align'")
        return self.prompter
