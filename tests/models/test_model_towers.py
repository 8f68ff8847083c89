"""Blocks, attention back ends, both towers: against independent references, and what padding must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cllip_fast.errors import InputError
from cllip_fast.models.attention import SelfAttention, attention_backend
from cllip_fast.models.blocks import Block, init_layer
from cllip_fast.models.positions import encode_points, patch_centres


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("causal", [False, True])
def test_block_is_torchs_pre_norm_layer(backend: str, causal: bool) -> None:
    torch.manual_seed(0)
    block = Block(12, 3, 4.0, backend=backend, causal=causal).double()
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, F.gelu, batch_first=True, norm_first=True).double()
    theirs = [layer.norm1, layer.self_attn.out_proj, layer.norm2, layer.linear1, layer.linear2]
    ours = [block.norm_1, block.attention.out, block.norm_2, block.mlp[0], block.mlp[2]]
    for a, b in zip(ours, theirs, strict=True):
        b.load_state_dict(a.state_dict())
    layer.self_attn.in_proj_weight.data = block.attention.qkv.weight.data
    layer.self_attn.in_proj_bias.data = block.attention.qkv.bias.data
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    mask = torch.ones(17, 17, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(block(x), layer(x, src_mask=mask))


@pytest.mark.parametrize("length", [1, 17])
def test_matmul_attention_equals_sdpa_with_padding(length: int) -> None:
    torch.manual_seed(0)
    real = torch.rand(3, length) < 0.5
    real[:, 0] = True
    mask = torch.zeros(3, length, dtype=torch.float64).masked_fill(~real, float("-inf"))[:, None, None]
    results = []
    for backend in ("sdpa", "matmul"):
        torch.manual_seed(1)
        attention = SelfAttention(8, 2, backend=backend).double()
        x = torch.randn(3, length, 8, dtype=torch.float64, requires_grad=True)
        y = attention(x, mask)
        (y * torch.randn_like(y)).sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0])


def test_flash_refuses_what_it_cannot_do() -> None:
    # The package is probed when the back end is chosen; this is the check when it is called.
    from cllip_fast.models.attention import BACKENDS

    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(InputError, match=r"attention='flash' got torch.float32 on cpu, expected float16 or bfloat16"):
        BACKENDS["flash"].attend(q, q, q, None, False)
    with pytest.raises(InputError, match=r"attention is 'other'"):
        attention_backend("other")


def test_point_encodings_are_distinct_and_start_at_quarter_period() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    encoded = encode_points(points, 16)
    assert encoded.shape == (2, 16)
    torch.testing.assert_close(encoded[0], torch.tensor([0.0] * 4 + [1.0] * 4, dtype=torch.float64).repeat(2))
    quarter = torch.pi / 2  # x = 1 at the lowest frequency: a quarter period; at the highest: 16 whole periods
    assert encoded[1, 0].item() == pytest.approx(torch.tensor(quarter).sin().item())
    assert encoded[1, 3].item() == pytest.approx(0, abs=1e-9)
    assert encoded[1, 7].item() == pytest.approx(1)
    assert encoded[1, 8].item() == pytest.approx(0.5**0.5)  # y = 0.5 at the lowest frequency
    torch.testing.assert_close(encoded.square().sum(-1), torch.full((2,), 8.0, dtype=torch.float64))


def test_patch_centres_run_row_by_row() -> None:
    expected = [[(column + 0.5) / 3, (row + 0.5) / 2] for row in range(2) for column in range(3)]
    torch.testing.assert_close(patch_centres((2, 3)), torch.tensor(expected))


def test_conv_stem_keeps_rows_and_columns(mini) -> None:
    """Changing the pixels of one corner changes that corner's token most: tokens lie row by row."""
    model = mini()
    image = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
    changed = image.clone()
    changed[..., 1:7, 17:23] = 1  # row 0, column 2 of the 3 × 3 grid
    stem = model.visual.stem
    difference = (stem(changed) - stem(image)).flatten(2).transpose(1, 2).norm(dim=-1)[0]
    assert difference.argmax().item() == 2


@pytest.mark.parametrize("causal", [False, True])
def test_text_padding_changes_nothing(mini, causal: bool) -> None:
    model = mini(causal_text=causal)
    text = torch.tensor([[3, 7, 2, 9], [5, 1, 0, 0]])
    features = model.encode_text(text)
    torch.testing.assert_close(model.encode_text(F.pad(text, (0, 8))), features)
    torch.testing.assert_close(model.encode_text(text[1:, :2]), features[1:])
    torch.testing.assert_close(model.encode_text(text.flip(0)), features.flip(0))
    assert not torch.allclose(model.encode_text(text[:, [1, 0, 2, 3]]), features)  # order matters


def test_causal_text_reads_the_last_token_and_bidirectional_all(mini) -> None:
    text, other = torch.tensor([[3, 7, 2, 0]]), torch.tensor([[3, 8, 2, 0]])
    for causal in (False, True):
        model = mini(causal_text=causal)
        assert not torch.allclose(model.encode_text(text), model.encode_text(other))
    causal_model = mini(causal_text=True, text_depth=1)
    tokens = causal_model.text.tokens(text) + causal_model.text.positions[:4]
    last = causal_model.text.blocks[0](tokens[:, :3])[:, 2]
    expected = causal_model.text.project(causal_model.text.norm_out(last))
    torch.testing.assert_close(causal_model.encode_text(text), expected)


def test_bidirectional_text_is_the_mean_over_real_tokens(mini) -> None:
    model = mini()
    text = torch.tensor([[3, 7, 2]])
    x = model.text.tokens(text) + model.text.positions[:3]
    for block in model.text.blocks:
        x = block(x)
    expected = model.text.project(model.text.norm_out(x).mean(1))
    torch.testing.assert_close(model.encode_text(F.pad(text, (0, 5))), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_empty_text_is_finite_forward_and_backward(mini, causal: bool) -> None:
    model = mini(causal_text=causal)
    model.encode_text(torch.zeros(2, 4, dtype=torch.int64), normalize=True).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.text.parameters() if p.grad is not None)


def test_layers_start_at_clips_scale() -> None:
    torch.manual_seed(0)
    block = Block(256, 4, 4.0, backend="sdpa")
    init_layer(block.attention.qkv, block.attention.out, block.mlp, depth=8)
    for weight, std in (
        (block.attention.qkv.weight, 256**-0.5),
        (block.attention.out.weight, 256**-0.5 / 4),
        (block.mlp[0].weight, 512**-0.5),
        (block.mlp[2].weight, 256**-0.5 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
