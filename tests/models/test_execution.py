"""Checkpointing, compiled blocks and packed texts: the numbers of the plain model, by less memory or work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from cllip_fast.errors import InputError
from cllip_fast.losses import CllipLoss
from cllip_fast.models import CllipModel, create_model, set_execution
from cllip_fast.models.attention import BACKENDS, Packing
from cllip_fast.models.blocks import Block
from cllip_fast.models.execution import compile_blocks
from tests.ranks import on_ranks

PARTS = ("region", "grounding", "patch")
KINDS = {
    "tiny": {"attention": "matmul"},  # bidirectional texts, prompts pooled alone
    "clip": {"causal_text": True, "class_token": True, "stem": "patch", "prompter_pool": "all", "attention": "sdpa"},
}


def make(kind: str, **options: object) -> CllipModel:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "vocab_size": 40, "text_length": 9, "embed_dim": 12, "vision_width": 32,
             "vision_depth": 2, "vision_heads": 2, "text_width": 16, "text_heads": 2}  # fmt: skip
    return create_model("tiny", **(sizes | KINDS[kind] | options)).double()


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Ragged texts: one full, one empty, one with a gap."""
    count, generator = 4, torch.Generator().manual_seed(1)
    text = torch.randint(1, 40, (count, 9), generator=generator)
    text = text * (torch.arange(9) < torch.tensor([9, 0, 5, 3])[:, None])
    text[2, 1] = 0
    low = torch.rand(count, 2, 2, generator=generator) / 2
    regions = torch.randint(1, 40, (count, 2, 5), generator=generator)
    regions[..., 3:] = 0
    regions[0, 0] = 0
    mask = torch.ones(count, 2, dtype=torch.bool)
    mask[0, 0] = False
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images.to(dtype), text, torch.cat([low, low + 0.4], -1).to(dtype), regions, mask


def step(model: nn.Module, rows: slice = slice(None), **options: object) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter."""
    loss = CllipLoss(**options)(**model(*(each[rows] for each in batch()), parts=PARTS))
    loss.backward()
    found = {"loss": loss.detach()} | {name: each.grad for name, each in model.named_parameters()}
    assert all(value is not None and value.isfinite().all() for value in found.values())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["selective", "blocks"])
def test_checkpointing_gives_the_same_bits(kind: str, mode: str) -> None:
    wanted, model = step(make(kind)), make(kind)
    set_execution(model, grad_checkpointing=mode)
    found = step(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("mode", ["selective", "blocks"])
def test_checkpointing_replays_dropout_and_autocast(mode: str) -> None:
    """The text tower runs twice: its weights are cast in both, and when they are computed again.

    Not from autocast's cache, as without checkpointing: there the gradients of both uses meet in bf16.
    """

    def run(mode: str) -> dict[str, Tensor]:
        model = make("clip").float()
        for module in model.modules():
            if isinstance(module, Block):
                module.mlp.insert(2, nn.Dropout(0.3))
        set_execution(model, grad_checkpointing=mode)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=mode != "none"):
            output = model(*batch(torch.float32), parts=PARTS)
        CllipLoss()(**output).backward()
        return {name: each.grad for name, each in model.named_parameters()}

    wanted, found = run("none"), run(mode)
    apart = ("visual.project.weight", "text.project.weight")  # in no block, and used twice
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name not in apart)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_are_the_padded_ones(kind: str) -> None:
    wanted, model = step(make(kind, attention="matmul")), make(kind, attention="matmul")
    set_execution(model, text_packing=True)
    found = step(model)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_multiply_nothing_for_padding(kind: str) -> None:
    """The products are those of each text by itself, cut to its own tokens."""
    model = make(kind, attention="matmul")
    text = torch.randint(1, 40, (5, 9)) * (torch.arange(9) < torch.tensor([9, 3, 2, 2, 4])[:, None])
    with FlopCounterMode(display=False) as alone:
        for row in text:
            model.text(row[None])
    with FlopCounterMode(display=False) as padded:
        model.text(text)
    set_execution(model, text_packing=True)
    with FlopCounterMode(display=False) as packed:
        model.text(text)
    pooling = 0 if model.config.causal_text else 2 * 20 * 16  # the padded tower's mean is a product
    assert packed.get_total_flops() == alone.get_total_flops() - pooling < 0.5 * padded.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_for_packed_attention_is_a_block_diagonal_mask(causal: bool) -> None:
    packing = Packing.of(torch.tensor([3, 1, 5]), 5)
    assert packing.ends.tolist() == [0, 3, 4, 9]
    assert packing.ends.dtype == torch.int32
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64) for _ in range(3))
    text = torch.tensor([0] * 3 + [1] + [2] * 5)
    seen = text[:, None] == text
    if causal:
        seen &= torch.ones(9, 9, dtype=torch.bool).tril()
    mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill_(~seen, float("-inf"))
    wanted = BACKENDS["sdpa"].attend(q[None], k[None], v[None], mask[None, None], False)[0]
    torch.testing.assert_close(BACKENDS["matmul"].attend_packed(q, k, v, packing, causal), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_texts_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    text = batch()[1].cuda()
    model = make(kind, attention="sdpa", text_width=128).float().cuda()

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype):
            features = model.encode_text(text)
        (features * features.detach().sign()).sum().backward()
        return features.detach().float(), model.text.blocks[0].attention.qkv.weight.grad.clone()

    wanted = run()
    set_execution(model, text_packing=True)
    for found, want in zip(run(), wanted, strict=True):
        assert (found - want).norm() < 0.02 * want.norm()


def test_what_cannot_be_is_refused() -> None:
    model = make("tiny")
    with pytest.raises(InputError, match="grad_checkpointing is 'all', expected one of none, selective, blocks"):
        set_execution(model, grad_checkpointing="all")
    set_execution(sdpa := make("tiny", attention="sdpa"), text_packing=True)
    with pytest.raises(
        InputError, match=r"attention='sdpa' got torch\.float32 on cpu, expected float16 or bfloat16 on"
    ):
        sdpa.float().encode_text(batch()[1])


def test_back_ends_without_a_packed_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "matmul", replace(BACKENDS["matmul"], attend_packed=None))
    with pytest.raises(InputError, match="text_packing is on with attention='matmul', which has no form for packed"):
        set_execution(make("tiny"), text_packing=True)


# Compilation


@pytest.fixture
def graphs() -> list:
    """The graphs that are compiled, by a backend that counts them and then runs AOTAutograd's."""
    torch._dynamo.reset()
    return []


def counting(graphs: list):
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return aot_eager(graph, inputs, **options)

    return backend


def test_compiled_blocks_share_their_code_and_give_the_same_numbers(graphs: list) -> None:
    def run(model: CllipModel) -> list[Tensor]:
        features = model.encode_image(batch()[0])
        return [features, *torch.autograd.grad(features.square().sum(), list(model.visual.parameters()))]

    wanted, model = run(make("clip", vision_depth=4)), make("clip", vision_depth=4)
    set_execution(model, grad_checkpointing="selective")
    compile_blocks(model, backend=counting(graphs))
    torch.testing.assert_close(run(model), wanted, rtol=1e-9, atol=1e-12)
    assert len(graphs) == 1


def compiled_on_two_ranks(rank: int, world_size: int) -> None:
    import torch.distributed as dist

    torch._dynamo.reset()
    wanted, model = step(make("clip")), make("clip")
    set_execution(model, grad_checkpointing="selective")
    compile_blocks(model, backend="aot_eager")
    rows = slice(2 * rank, 2 * rank + 2)
    step(DistributedDataParallel(model), rows, group=dist.group.WORLD)
    found = {name: each.grad for name, each in model.named_parameters()}
    torch.testing.assert_close(found, {name: wanted[name] for name in found}, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_checkpointed_blocks_under_ddp() -> None:
    on_ranks(2, compiled_on_two_ranks)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers() -> None:
    torch._dynamo.reset()
    wanted, model = step(make("clip")), make("clip")
    set_execution(model, grad_checkpointing="selective", compile=True)
    torch.testing.assert_close(step(model), wanted, rtol=1e-9, atol=1e-12)


def test_the_patch_convolution_is_the_same_in_channels_last() -> None:
    """Its input is laid out so, always: the tokens come out as the convolution writes them, without a copy."""
    model, images = make("clip"), batch()[0]
    seen = []
    model.visual.stem.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    tokens = model.image_tokens(images)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)
    assert torch.equal(seen[0], images)
    plain = torch.nn.functional.conv2d(images.contiguous(), model.visual.stem.weight, stride=8)
    torch.testing.assert_close(seen[1], plain)
    assert torch.equal(tokens, model.image_tokens(images.to(memory_format=torch.channels_last)))
