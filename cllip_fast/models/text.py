"""The text tower: token ids to one feature a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllip_fast.models.attention import Packing
from cllip_fast.models.blocks import Block, init_blocks
from cllip_fast.models.checks import values_at_hand
from cllip_fast.models.config import ModelConfig
from cllip_fast.models.norm import layer_norm


class TextTower(nn.Module):
    """Transformer over token ids; id 0 is padding, and padding never changes a feature.

    Causal (as CLIP): the feature is the last real token's, which cannot see the padding behind it.
    Bidirectional: padded keys are masked, the feature is the mean over the real tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, depth = config.text_width, config.text_depth
        self.causal = config.causal_text
        self.packing = False  # True: padding is left out before the blocks, see `set_execution`
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(config.text_length, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.text_heads,
                config.mlp_ratio,
                backend=config.attention,
                causal=self.causal,
                quick_gelu=config.quick_gelu,
                norm=config.norm,
            )
            for _ in range(depth)
        )
        self.norm_out = layer_norm(config.norm)(width)
        self.project = nn.Linear(width, config.embed_dim, bias=False)
        # CLIP's small embeddings make all texts of a fresh model nearly equal, which costs a short run much of its
        # length (docs/log.md): the bidirectional tower starts with words that differ.
        size = 0.02 if self.causal else 1.0
        nn.init.normal_(self.tokens.weight, std=size)
        nn.init.normal_(self.positions, std=size / (2 if self.causal else 10))
        init_blocks(self.blocks)
        nn.init.normal_(self.project.weight, std=width**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Token ids [N, L] to features [N, E]. A text without any token gives a finite feature of no meaning."""
        if values_at_hand(text):  # columns that are padding in every text change nothing but the time
            used = (text != 0).any(0).nonzero()
            text = text[:, : int(used[-1]) + 1 if len(used) else 1]
        if self.packing:
            return self._packed(text)
        length = text.shape[1]
        x = self.tokens(text) + self.positions[:length]
        if self.causal:
            last = (torch.arange(length, device=text.device) * (text != 0)).amax(1)
            for block in self.blocks:
                x = block(x)
            x = x[torch.arange(x.shape[0], device=x.device), last]
            return self.project(self.norm_out(x))
        # The first position always counts, so that a padded region's empty text does not divide by zero.
        real = (text != 0) | (torch.arange(length, device=text.device) == 0)
        mask = torch.zeros(real.shape, device=x.device, dtype=x.dtype).masked_fill_(~real, float("-inf"))
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        weight = real.to(x.dtype) / real.sum(1, keepdim=True)
        return self.project(torch.einsum("nl,nlw->nw", weight, self.norm_out(x)))

    def _packed(self, text: Tensor) -> Tensor:
        """`forward` on the texts' own tokens alone, one after the other: no product, norm or score for padding.

        On a GPU this waits for the queue once, to learn how many tokens there are.
        """
        length = text.shape[1]
        places = torch.arange(length, device=text.device)
        real = (text != 0) | (places == 0)
        if self.causal:  # what lies before the last token is seen by it, whatever it is
            real = places <= (places * (text != 0)).amax(1, keepdim=True)
        rows, columns = real.nonzero(as_tuple=True)  # [T], T tokens in all
        packing = Packing.of(real.sum(1), length)
        x = self.tokens(text[rows, columns]) + self.positions[columns]  # [T, W]
        for block in self.blocks:
            x = block(x, packing)
        if self.causal:
            return self.project(self.norm_out(x[packing.ends[1:].long() - 1]))
        x = torch.segment_reduce(self.norm_out(x), "mean", offsets=packing.ends.long())
        return self.project(x)
