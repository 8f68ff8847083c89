"""Multi-head self-attention with a fused query-key-value projection, and its back ends by name.

    sdpa      torch's scaled_dot_product_attention (default)
    matmul    two batched products and a softmax: on a CPU 1.2 to 2.5 times as fast as sdpa, up to 64 tokens
    flash     FlashAttention-2, the flash-attn package: NVIDIA GPU, fp16 or bf16
    fa3       FlashAttention-3, its flash_attn_interface: Hopper, fp16 or bf16
    fa4       FlashAttention-4, its flash_attn.cute: Hopper and Blackwell, fp16 or bf16
    xformers  xformers' memory-efficient attention

The three of FlashAttention have no arbitrary masks: calls with a mask (padding of a bidirectional text tower) take sdpa
under them, unless texts are packed. Packed sequences have no padding: [T, H, D], T tokens of all texts in a row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllip_fast.errors import InputError, check_choice
from cllip_fast.extras import require


@dataclass(frozen=True)
class Packing:
    """Where packed sequences end: `ends` [N + 1] int32, 0 first; none is longer than `longest`."""

    ends: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, longest: int) -> Packing:
        """From the lengths [N]."""
        return cls(F.pad(lengths.cumsum(0), (1, 0)).int(), longest)


# q, k, v [B, L, H, D], additive mask [B or 1, 1, L or 1, L] or None, causal flag -> [B, L, H, D].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
# q, k, v [T, H, D], packing, causal flag -> [T, H, D].
AttendPacked = Callable[[Tensor, Tensor, Tensor, Packing, bool], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _sdpa_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool) -> Tensor:
    """torch's own, which is FlashAttention-2's kernel."""
    _check_flash("sdpa", q)
    varlen_attn, by_window = _torch_varlen()
    option = {"window_size": (-1, 0) if causal else (-1, -1)} if by_window else {"is_causal": causal}
    return varlen_attn(q, k, v, packing.ends, packing.ends, packing.longest, packing.longest, **option)


@functools.cache
def _torch_varlen() -> tuple[Callable[..., Tensor], bool]:
    """torch's function, and whether causality is said by a window: torch 2.10, its first, has a flag for it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise InputError(f"text_packing with attention='sdpa' needs torch 2.10, not {torch.__version__}") from error
    return varlen_attn, "window_size" in inspect.signature(varlen_attn).parameters


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    length, width = q.shape[1], q.shape[-1]
    scores = (q.transpose(1, 2) * width**-0.5) @ k.permute(0, 2, 3, 1)
    if causal:
        mask = torch.full((length, length), float("-inf"), device=q.device, dtype=q.dtype).triu_(1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def _matmul_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool) -> Tensor:
    """Sequence by sequence: the reference of the others, and the one that runs anywhere."""
    lengths = packing.ends.diff().tolist()
    each = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([_matmul(*(x[None] for x in qkv), None, causal)[0] for qkv in each])


def _check_flash(name: str, q: Tensor) -> None:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"attention={name!r} got {q.dtype} on {q.device}, expected float16 or bfloat16 on a GPU")


def _first(output: Any) -> Tensor:
    """FlashAttention-4 and betas of FlashAttention-3 return (output, log-sum-exp)."""
    return output[0] if isinstance(output, tuple) else output


def _flash(name: str, import_: Callable[[], Any]) -> tuple[Attend, AttendPacked]:
    """FlashAttention's functions as ours; `import_` gives the module that has them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if mask is not None:
            return _sdpa(q, k, v, mask, causal)
        _check_flash(name, q)
        return _first(import_().flash_attn_func(q, k, v, causal=causal))

    def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool) -> Tensor:
        _check_flash(name, q)
        return _first(
            import_().flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=packing.ends,
                cu_seqlens_k=packing.ends,
                max_seqlen_q=packing.longest,
                max_seqlen_k=packing.longest,
                causal=causal,
            )
        )

    return attend, attend_packed


def _fa2() -> Any:
    import flash_attn

    return flash_attn


def _fa3() -> Any:
    import flash_attn_interface

    return flash_attn_interface


def _fa4() -> Any:
    import flash_attn.cute

    return flash_attn.cute


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if mask is not None:
        batch, length, heads, _ = q.shape
        mask = mask.to(q.dtype).expand(batch, heads, length, length)
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else mask)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention: for sequences of one length, for packed ones if it can, and what it needs.

    Attributes:
        package: optional package; None: torch alone.
        capabilities: the majors of CUDA's compute capability that it has kernels for; (): any device.
    """

    attend: Attend
    attend_packed: AttendPacked | None
    package: str | None = None
    capabilities: tuple[int, ...] = ()


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa, _sdpa_packed),
    "matmul": Backend(_matmul, _matmul_packed),
    "flash": Backend(*_flash("flash", _fa2), "flash-attn"),
    "fa3": Backend(*_flash("fa3", _fa3), "flash-attn-3", (9,)),
    "fa4": Backend(*_flash("fa4", _fa4), "flash-attn-4", (9, 10, 11)),
    "xformers": Backend(_xformers, None, "xformers"),
}


def attention_backend(name: str) -> Backend:
    """The back end called `name`. Raises `InputError` if it is unknown, its package absent, or the GPU another."""
    backend = BACKENDS[check_choice("attention", name, tuple(BACKENDS))]
    if backend.package is not None:
        require(backend.package, f"attention={name!r}")
    if backend.capabilities and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major not in backend.capabilities:
            expected = ", ".join(f"{each}.x" for each in backend.capabilities)
            raise InputError(f"attention={name!r} on a GPU of compute capability {major}.{minor}, expected {expected}")
    return backend


class SelfAttention(nn.Module):
    """Multi-head self-attention on the named back end: [B, L, W] -> [B, L, W], or packed, [T, W] -> [T, W]."""

    def __init__(self, width: int, heads: int, *, backend: str = "sdpa", causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.backend = attention_backend(backend)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | Packing | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if isinstance(mask, Packing):
            attended = self.backend.attend_packed(q, k, v, mask, self.causal)
        else:
            attended = self.backend.attend(q, k, v, mask, self.causal)
        return self.out(attended.flatten(-2))
