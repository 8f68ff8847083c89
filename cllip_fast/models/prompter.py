"""The Prompter: region features from box prompts, boxes from text prompts (arXiv 2410.02746, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllip_fast.models import checkpointing
from cllip_fast.models.blocks import Mlp, init_layer
from cllip_fast.models.config import ModelConfig
from cllip_fast.models.norm import layer_norm
from cllip_fast.models.positions import encode_points, patch_centres

BOX_TOKENS = 2


class ImageRows(NamedTuple):
    """The image tokens' own attention, to one another alone."""

    queries: Tensor  # [B, T, W], divided by √W
    attended: Tensor  # [B, T, W], after the output projection
    row_lse: Tensor  # [B, T], of the scores; fp32 at least


class ImageMemory(NamedTuple):
    """What no prompt changes, computed once an image."""

    tokens: Tensor  # [B, T, W], the layer's input
    keys: Tensor  # [B, T, W]
    values: Tensor  # [B, T, W]
    rows: ImageRows | None  # with pool="all"


class Prompter(nn.Module):
    """One single-head pre-norm transformer layer over [prompt tokens, image tokens], pooled and projected.

    A box prompt is 2 tokens (sinusoidal encodings of its corners plus a learned vector each), a text prompt 1 token
    (a linear map of the text's feature); both share all weights of the layer. Each prompt has a sequence of its own:
    prompts never see one another.

    pool="all": the paper's mean over all tokens of the sequence. The image's attention to itself, output projection
    included, is computed once an image, and a prompt merged into it by the scores' log-sum-exp. Each prompt is left
    with the first half of the MLP on T + n tokens: the second half follows the mean.
    pool="prompt": the mean over the prompt's own n tokens. Image tokens then are keys and values only, computed once
    an image, and only the prompts' rows are computed: the whole layer's numbers at a few percent of its cost.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.pool = config.prompter_pool
        self.grad_checkpointing = "none"
        self.corner_type = nn.Parameter(torch.empty(BOX_TOKENS, width))
        self.text_prompt = nn.Linear(config.embed_dim, width)
        self.norm_1 = layer_norm(config.norm)(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = layer_norm(config.norm)(width)
        self.mlp = Mlp(width, config.mlp_ratio)
        self.norm_out = layer_norm(config.norm)(width)
        self.project = nn.Linear(width, config.embed_dim, bias=False)
        self.box_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
        positions = None
        if config.prompter_positions:
            positions = encode_points(patch_centres(config.patch_grid), width)
            positions = F.pad(positions, (0, 0, int(config.class_token), 0))  # the class token has no place
        self.register_buffer("positions", positions, persistent=False)
        self._init_parameters()

    def _init_parameters(self) -> None:
        nn.init.normal_(self.corner_type, std=0.02)
        nn.init.normal_(self.text_prompt.weight, std=self.text_prompt.in_features**-0.5)
        nn.init.zeros_(self.text_prompt.bias)
        init_layer(self.qkv, self.out, self.mlp, depth=1)
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        # Start from the box in the middle, (1/4, 1/4, 3/4, 3/4): one without area has no useful IoU gradient.
        nn.init.normal_(self.box_head[2].weight, std=0.02)
        with torch.no_grad():
            self.box_head[2].bias.copy_(torch.logit(torch.tensor([0.25, 0.25, 0.75, 0.75])))

    def box_prompts(self, boxes: Tensor) -> Tensor:
        """Boxes [B, M, 4] (xyxy in [0, 1]) to prompt tokens [B, M, 2, W]."""
        corners = boxes.unflatten(-1, (BOX_TOKENS, 2))
        return encode_points(corners, self.corner_type.shape[1]).to(self.corner_type.dtype) + self.corner_type

    def text_prompts(self, text_features: Tensor) -> Tensor:
        """Text features [B, K, E], of any length, to prompt tokens [B, K, 1, W]."""
        # Entries of size one, like a normed activation, whether or not the caller normalised the features.
        unit = F.normalize(text_features, dim=-1) * text_features.shape[-1] ** 0.5
        return self.text_prompt(unit)[:, :, None]

    def remember(self, image_tokens: Tensor) -> ImageMemory:
        """Image tokens [B, T, W] to what all prompts of the image share."""
        tokens, keys, values, *rows = checkpointing.run(self.grad_checkpointing, self._remember, image_tokens)
        return ImageMemory(tokens, keys, values, ImageRows(*rows) if rows else None)

    def _remember(self, image_tokens: Tensor) -> tuple[Tensor, ...]:
        """The fields of `ImageMemory`, then those of its `ImageRows`."""
        if self.positions is not None:
            image_tokens = image_tokens + self.positions
        normed, width = self.norm_1(image_tokens), image_tokens.shape[-1]
        if self.pool == "prompt":
            projected = F.linear(normed, self.qkv.weight[width:], self.qkv.bias[width:])
            return (image_tokens, *projected.chunk(2, dim=-1))
        q, k, v = self.qkv(normed).chunk(3, dim=-1)
        q = q * width**-0.5
        # Written out, as a fused attention hides its log-sum-exp: with one head, once an image, [B, T, T] is small.
        scores = q @ k.transpose(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        row_lse = scores.logsumexp(-1)
        shares = (scores - row_lse[..., None]).exp().to(v.dtype)
        return image_tokens, k, v, q, self.out(shares @ v), row_lse

    def forward(self, memory: ImageMemory, prompts: Tensor) -> Tensor:
        """Prompt tokens [B, K, n, W] to one pooled vector a prompt, [B, K, W], after the final norm."""
        tokens, keys, values, rows = memory
        return checkpointing.run(self.grad_checkpointing, self._layer, prompts, tokens, keys, values, *(rows or ()))

    def _layer(self, prompts: Tensor, tokens: Tensor, keys: Tensor, values: Tensor, *rows: Tensor) -> Tensor:
        """`forward` on the fields of the memory and of its rows: checkpointing must see each tensor that is kept."""
        memory = ImageMemory(tokens, keys, values, ImageRows(*rows) if rows else None)
        q, k, v = self.qkv(self.norm_1(prompts)).chunk(3, dim=-1)  # [B, K, n, W] each
        x = prompts + self.out(self._attend(q, k, v, memory))
        if memory.rows is not None:
            x = torch.cat([x, self._image_rows(k, v, memory)], dim=2)
        return self.norm_out(self._mean_after_mlp(x))

    def region_features(self, memory: ImageMemory, boxes: Tensor) -> Tensor:
        """Boxes [B, M, 4] to region features [B, M, E]."""
        return self.project(self(memory, self.box_prompts(boxes)))

    def predict_boxes(self, memory: ImageMemory, text_features: Tensor) -> Tensor:
        """Text features [B, K, E] to boxes [B, K, 4], xyxy in [0, 1], x0 <= x1 and y0 <= y1.

        The head predicts two opposite corners, as in the paper; should they come in the wrong order they are sorted,
        coordinate by coordinate, so that the gradient of each still reaches the output that made it.
        """
        logits = self.box_head(self(memory, self.text_prompts(text_features)))
        # Not in bf16, whose steps near 1 are half a percent of the image's side.
        corners = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        first, second = corners.unflatten(-1, (2, 2)).unbind(-2)
        return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)

    def attention(self, memory: ImageMemory, prompts: Tensor) -> Tensor:
        """What each prompt token looks at, to be shown: [B, K, n, W] to shares [B, K, n, n+T] that sum to 1.

        The first n are those of the prompt's own tokens, the others those of the image's, a class token before patches.
        """
        q, k, _ = self.qkv(self.norm_1(prompts)).chunk(3, dim=-1)
        return self._shares(q, k, memory)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, memory: ImageMemory) -> Tensor:
        """What the prompts' tokens gather, each from its own prompt and the image: [B, K, n, W]."""
        own, image = self._shares(q, k, memory).split((q.shape[2], memory.keys.shape[1]), dim=-1)
        return own @ v + (image.flatten(1, 2) @ memory.values).unflatten(1, q.shape[1:3])

    def _shares(self, q: Tensor, k: Tensor, memory: ImageMemory) -> Tensor:
        """The softmax of the prompts' scores with their own tokens and the image's: [B, K, n, n+T]."""
        q = q * q.shape[-1] ** -0.5
        to_image = (q.flatten(1, 2) @ memory.keys.transpose(1, 2)).unflatten(1, q.shape[1:3])
        return torch.cat([q @ k.transpose(-1, -2), to_image], dim=-1).softmax(-1)

    def _image_rows(self, k: Tensor, v: Tensor, memory: ImageMemory) -> Tensor:
        """The image's tokens after an attention that also sees the prompt: [B, K, T, W].

        The softmax over T + n scores is the one over n scores and the log-sum-exp of the other T. Its shares sum to
        one, so that the output projection, bias included, may come before the mean that they weigh.
        """
        tokens, rows, (count, length) = memory.tokens, memory.rows, k.shape[1:3]
        to_prompts = (rows.queries @ k.flatten(1, 2).transpose(1, 2)).unflatten(2, (count, length)).transpose(1, 2)
        to_image = rows.row_lse[:, None, :, None].expand(-1, count, -1, -1)
        shares = torch.cat([to_image, to_prompts], dim=-1).softmax(-1).to(tokens.dtype)  # [B, K, T, 1+n]
        image, prompt = shares.split((1, length), dim=-1)
        return tokens[:, None] + image * rows.attended[:, None] + prompt @ self.out(v)

    def _mean_after_mlp(self, x: Tensor) -> Tensor:
        """The mean over tokens, [B, K, L, W] to [B, K, W], of x + mlp(norm(x)), whose last map is linear: after it."""
        expand, gelu, contract = self.mlp
        return x.mean(2) + contract(gelu(expand(self.norm_2(x))).mean(2))
