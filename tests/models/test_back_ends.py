"""Attention and norm back ends that cannot be installed here: their adapters, against stubs with the peers' signatures.

A stub computes the real thing in plain PyTorch, by the documentation of the package: wrong orders of arguments, layouts
or causal flags give other numbers, or are refused by the signature. Names and orders are those of flash-attn 2
(flash_attn/flash_attn_interface.py), FlashAttention-3 (hopper/flash_attn_interface.py), FlashAttention-4
(flash_attn/cute/interface.py) and Apex (apex/normalization/fused_layer_norm.py).
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.models import attention, create_model, norm, set_execution
from cllip_fast.models.attention import Packing, attention_backend
from cllip_fast.models.norm import layer_norm


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[B, L, H, D], as FlashAttention's functions take and give them."""
    assert q.dim() == 4
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def ragged(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest: int, causal: bool) -> Tensor:
    """[T, H, D] and the ends of the sequences, int32."""
    assert q.dim() == 3
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert int(ends_q.diff().max()) <= longest
    spans = list(zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True))
    return torch.cat([dense(q[None, a:b], k[None, a:b], v[None, a:b], causal)[0] for a, b in spans])


class FlashAttention2:
    @staticmethod
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        assert (dropout_p, softmax_scale) == (0.0, None)
        return dense(q, k, v, causal)

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
        assert (dropout_p, softmax_scale) == (0.0, None)
        return ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal)


class FlashAttention3:
    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
        assert (softmax_scale, qv) == (None, None)
        return dense(q, k, v, causal)

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                               seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                               k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                               num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
                               return_attn_probs=False):  # fmt: skip
        assert (seqused_q, seqused_k, softmax_scale) == (None, None, None)
        return ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal)


class FlashAttention4:
    """Gives its log-sum-exp too, as betas of FlashAttention-3 do."""

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None,
                        return_lse=False):  # fmt: skip
        assert softmax_scale is None
        return dense(q, k, v, causal), None

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                               seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
                               window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
                               pack_gqa=None, deterministic=False, return_lse=False):  # fmt: skip
        assert (seqused_q, seqused_k, page_table, softmax_scale) == (None, None, None, None)
        return ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal), None


STUBS = {
    "flash": ("flash_attn", FlashAttention2),
    "fa3": ("flash_attn_interface", FlashAttention3),
    "fa4": ("flash_attn.cute", FlashAttention4),
}
PACKAGES = {"flash": "flash-attn", "fa3": "flash-attn-3", "fa4": "flash-attn-4", "xformers": "xformers"}


def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module of that name, in packages as needed, for the time of a test; what was probed is forgotten."""
    parent = None
    for part in range(name.count(".") + 1):
        path = ".".join(name.split(".")[: part + 1])
        module = ModuleType(path)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(path, None), []
        monkeypatch.setitem(sys.modules, path, module)
        if parent is not None:
            setattr(parent, path.rpartition(".")[2], module)
        parent = module
    for member, value in members.items():
        setattr(parent, member, value)
    monkeypatch.setattr(extras, "probe", getattr(extras.probe, "__wrapped__", extras.probe))


@pytest.fixture(params=STUBS)
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a back end whose package is a stub, on any device and in any type."""
    module, stub = STUBS[request.param]
    functions = {name: getattr(stub, name) for name in ("flash_attn_func", "flash_attn_varlen_func")}
    put(monkeypatch, module, **functions)
    monkeypatch.setattr(attention, "_check_flash", lambda name, q: None)
    return request.param


def inputs() -> list[Tensor]:
    return [torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def outputs_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    output = function(*tensors)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), tensors)]


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_the_default(flash: str, causal: bool) -> None:
    tensors = inputs()
    found = outputs_and_gradients(lambda *qkv: attention_backend(flash).attend(*qkv, None, causal), tensors)
    wanted = outputs_and_gradients(lambda *qkv: attention_backend("sdpa").attend(*qkv, None, causal), tensors)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_flash_attention_is_the_reference(flash: str, causal: bool) -> None:
    tensors, packing = inputs(), Packing.of(torch.tensor([3, 1, 6]), 7)

    def run(name: str):
        return lambda *qkv: attention_backend(name).attend_packed(*(x.flatten(0, 1) for x in qkv), packing, causal)

    found, wanted = (outputs_and_gradients(run(name), tensors) for name in (flash, "matmul"))
    torch.testing.assert_close(found, wanted)


def test_masks_take_sdpa_under_it(flash: str) -> None:
    q, k, v = inputs()
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[0, ..., 3:] = float("-inf")
    found, wanted = (attention_backend(name).attend(q, k, v, mask, False) for name in (flash, "sdpa"))
    torch.testing.assert_close(found, wanted)


def test_a_whole_model_with_packed_texts(flash: str) -> None:
    sizes = {"image_size": 16, "vocab_size": 30, "text_length": 6, "embed_dim": 8, "vision_width": 16,
             "vision_heads": 2, "text_width": 16, "text_heads": 2}  # fmt: skip
    model, plain = (create_model("tiny", **sizes, attention=name).double() for name in (flash, "sdpa"))
    plain.load_state_dict(model.state_dict())
    set_execution(model, text_packing=True)
    text = torch.randint(1, 30, (4, 6)) * (torch.arange(6) < torch.tensor([6, 2, 0, 4])[:, None])
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model.encode_text(text), plain.encode_text(text))
    torch.testing.assert_close(model.encode_image(images), plain.encode_image(images))


@pytest.mark.parametrize("name", STUBS)
def test_flash_attention_is_refused_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, STUBS[name][0])
    q = torch.zeros(1, 2, 1, 8)
    message = f"attention='{name}' got torch.float32 on cpu, expected float16 or bfloat16 on a GPU"
    with pytest.raises(InputError, match=message):
        attention_backend(name).attend(q, q, q, None, False)
    with pytest.raises(InputError, match=message):
        attention_backend(name).attend_packed(q[0], q[0], q[0], Packing.of(torch.tensor([2]), 2), False)


@pytest.mark.parametrize(("name", "capability", "expected"), [("fa3", (8, 0), "9.x"), ("fa3", (10, 0), "9.x"),
                                                              ("fa4", (8, 9), "9.x, 10.x, 11.x")])  # fmt: skip
def test_gpus_without_kernels_are_refused(
    name: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, STUBS[name][0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    where = ".".join(map(str, capability))
    with pytest.raises(InputError, match=f"'{name}' on a GPU of compute capability {where}, expected {expected}"):
        attention_backend(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_absent_packages_are_refused(name: str) -> None:
    if extras.probe(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is installed here")
    with pytest.raises(InputError, match=f"attention='{name}' needs {PACKAGES[name]}, which cannot be imported here"):
        create_model("tiny", attention=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*PACKAGES, "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_back_ends_on_a_gpu(name: str, causal: bool, dtype: torch.dtype) -> None:
    """Errors against fp64 at most twice, gradients three times those of plain PyTorch in the same type."""
    try:
        backend = attention_backend(name)
    except InputError as error:
        pytest.skip(str(error))
    exact = [torch.randn(2, 197, 3, 64, dtype=torch.float64, device="cuda") for _ in range(3)]
    rounded = [each.to(dtype) for each in exact]

    def run(function, tensors: list[Tensor]) -> list[Tensor]:
        tensors = [each.detach().requires_grad_() for each in tensors]
        output = function(*tensors)
        return [output.double(), *(each.double() for each in torch.autograd.grad(output.sum(), tensors))]

    wanted = run(lambda *qkv: dense(*qkv, causal), [each.double() for each in rounded])
    plain = run(lambda *qkv: dense(*qkv, causal), rounded)
    found = run(lambda *qkv: backend.attend(*qkv, None, causal), rounded)
    for number, (ours, theirs, right) in enumerate(zip(found, plain, wanted, strict=True)):
        assert (ours - right).abs().max() <= (3 if number else 2) * (theirs - right).abs().max() + 1e-5


# Norm


class FusedLayerNorm(nn.Module):
    """As Apex's: under autocast it casts its input down, and the result is of that type."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.shape, self.eps = (normalized_shape,), eps
        self.weight, self.bias = nn.Parameter(torch.ones(self.shape)), nn.Parameter(torch.zeros(self.shape))

    def forward(self, input):
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(input.float(), self.shape, self.weight, self.bias, self.eps).to(input.dtype)


@pytest.fixture
def apex_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "apex.optimizers")
    put(monkeypatch, "apex.normalization", FusedLayerNorm=FusedLayerNorm)
    put(monkeypatch, "fused_layer_norm_cuda")
    norm._apex_norm.cache_clear()
    yield
    norm._apex_norm.cache_clear()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.usefixtures("apex_norm")
def test_apex_norm_is_torchs(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_check_device", lambda x: None)
    x = torch.randn(3, 5, 8, requires_grad=True)
    ours, theirs = layer_norm("apex")(8), layer_norm("torch")(8)
    theirs.weight.data.normal_()
    theirs.bias.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = module(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, module.weight, module.bias])])
    torch.testing.assert_close(*results)
    assert results[0][0].dtype == torch.float32  # the residual stream begins with it


@pytest.mark.usefixtures("apex_norm")
def test_apex_norm_is_everywhere_and_refused_on_a_cpu() -> None:
    model, plain = create_model("tiny", norm="apex"), create_model("tiny")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    with pytest.raises(InputError, match="norm='apex' got a tensor on cpu, expected one on a GPU"):
        model.encode_image(torch.zeros(1, 3, 64, 64))


def test_apex_is_refused_where_it_is_absent_or_half_built(monkeypatch: pytest.MonkeyPatch) -> None:
    if extras.probe("apex"):
        pytest.skip("Apex is installed here")
    with pytest.raises(InputError, match="norm='apex' needs apex, which cannot be imported here: build NVIDIA Apex"):
        create_model("tiny", norm="apex")
    put(monkeypatch, "apex.optimizers")
    with pytest.raises(InputError, match="needs Apex's CUDA extension fused_layer_norm_cuda"):
        create_model("tiny", norm="apex")
    with pytest.raises(InputError, match="norm is 'rms', expected one of torch, apex"):
        create_model("tiny", norm="rms")
