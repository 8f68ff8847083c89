"""Multi-head self-attention with a fused query-key-value projection, and its back ends by name.

    sdpa      torch's scaled_dot_product_attention (default)
    matmul    two batched products and a softmax: on a CPU 1.2 to 2.5 times as fast as sdpa, up to 64 tokens
    flash     the flash-attn package: NVIDIA GPU, fp16 or bf16
    xformers  xformers' memory-efficient attention

`flash` has no arbitrary masks, so calls with a mask (padding of a bidirectional text tower) take sdpa under it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_choice
from cllip_fast.extras import require

# All back ends: q, k, v [B, L, H, D], additive mask [B or 1, 1, L or 1, L] or None, causal flag -> [B, L, H, D].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    length, width = q.shape[1], q.shape[-1]
    scores = (q.transpose(1, 2) * width**-0.5) @ k.permute(0, 2, 3, 1)
    if causal:
        mask = torch.full((length, length), float("-inf"), device=q.device, dtype=q.dtype).triu_(1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None:
        return _sdpa(q, k, v, mask, causal)
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"attention='flash' got {q.dtype} on {q.device}, expected float16 or bfloat16 on a GPU")
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if mask is not None:
        batch, length, heads, _ = q.shape
        mask = mask.to(q.dtype).expand(batch, heads, length, length)
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else mask)


_BACKENDS: dict[str, tuple[Attend, str | None]] = {
    "sdpa": (_sdpa, None),
    "matmul": (_matmul, None),
    "flash": (_flash, "flash-attn"),
    "xformers": (_xformers, "xformers"),
}


def attention_backend(name: str) -> Attend:
    """The attention function called `name`. Raises `InputError` if it is unknown or its package is absent."""
    function, package = _BACKENDS[check_choice("attention", name, tuple(_BACKENDS))]
    if package is not None:
        require(package, f"attention={name!r}")
    return function


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, L, W] -> [B, L, W], on the named back end."""

    def __init__(self, width: int, heads: int, *, backend: str = "sdpa", causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.attend = attention_backend(backend)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.unbind(2)
        return self.out(self.attend(q, k, v, mask, self.causal).reshape(batch, length, width))
