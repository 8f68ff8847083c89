"""The vision transformer: images to tokens, and tokens to the joint space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllip_fast.models.blocks import Block, init_blocks
from cllip_fast.models.config import ModelConfig
from cllip_fast.models.norm import layer_norm
from cllip_fast.models.positions import encode_points, patch_centres


def _conv_stem(width: int) -> nn.Sequential:
    """Three 4×4 convolutions of stride 2: one token for 8×8 pixels, each of which sees 22×22."""
    widths = (3, width // 4, width // 2, width)
    layers: list[nn.Module] = []
    for i in range(3):
        convolution = nn.Conv2d(widths[i], widths[i + 1], kernel_size=4, stride=2, padding=1)
        # torch's default shrinks each layer: the tokens would start at 1/20 and drown in the positions.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.GELU()]
    return nn.Sequential(*layers[:-1])


class VisionTower(nn.Module):
    """ViT as in CLIP: stem, class token (optional), positions, norm, blocks; final norm and projection apart.

    `forward` stops before the final norm, so that Prompter and RoIAlign read the same tokens as the pooling does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, depth = config.vision_width, config.vision_depth
        rows, columns = config.patch_grid
        patches = rows * columns
        self.extra_tokens = int(config.class_token)
        if config.stem == "conv":
            self.stem: nn.Module = _conv_stem(width)
        else:
            self.stem = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width)) if config.class_token else None
        if config.stem == "conv":
            # At most half a period a patch: higher frequencies alias on this grid. As large as the stem's tokens, or
            # attention is slow to find neighbours (docs/log.md).
            table = encode_points(patch_centres(config.patch_grid), width, highest=rows)
            self.positions = nn.Parameter(F.pad(table, (0, 0, self.extra_tokens, 0)))
        else:
            self.positions = nn.Parameter(width**-0.5 * torch.randn(patches + self.extra_tokens, width))
        self.norm_in = layer_norm(config.norm)(width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.vision_heads,
                config.mlp_ratio,
                backend=config.attention,
                quick_gelu=config.quick_gelu,
                norm=config.norm,
            )
            for _ in range(depth)
        )
        self.norm_out = layer_norm(config.norm)(width)
        self.project = nn.Linear(width, config.embed_dim, bias=False)
        init_blocks(self.blocks)
        nn.init.normal_(self.project.weight, std=width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to tokens [B, T, W]; T is the number of patches, plus one with a class token (first)."""
        # In channels-last memory the convolution's output is [B, h, w, W] as it lies: tokens without a copy.
        x = self.stem(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            # x.shape[0], not len(x): torch.export would take the latter for a constant.
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.norm_in(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x

    def pool_normed(self, normed: Tensor) -> Tensor:
        """Tokens after the final norm [B, T, W] to image features [B, E]: class token, or mean over the patches."""
        return self.project(normed[:, 0] if self.extra_tokens else normed.mean(1))
