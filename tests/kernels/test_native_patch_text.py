"""The native pooling of patch scores: against plain PyTorch and fp64, every instruction set, 1 and 2 threads."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from cllip_fast.kernels.patch_text import native as native_patch_text
from cllip_fast.kernels.patch_text import tiles
from cllip_fast.losses import PatchTextLoss
from cllip_fast.streaming.backends import kernels
from tests import dense
from tests.kernels.test_native import built, instructions  # noqa: F401 (a fixture)
from tests.peak import measurable, peak_bytes
from tests.ranks import on_ranks

pytestmark = [built, pytest.mark.usefixtures("instructions")]
POOLS = ("max", "softmax")
SHAPES = [(1, 1, 1, 1), (3, 1, 17, 7), (2, 17, 123, 24), (5, 196, 33, 50), (3, 300, 507, 13), (1, 1030, 131, 9)]
NAN = float("nan")


def batch(images: int, patches: int, texts: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches, texts, a gradient, and a mask that leaves every image a patch; fp64."""
    generator = torch.Generator().manual_seed(images + texts)
    mask = torch.rand(images, patches, generator=generator) < 0.7
    mask[:, patches // 2] = True
    gradient = torch.randn(images, texts, dtype=torch.float64, generator=generator)
    rows = dense.features(images * patches, width)[0].view(images, patches, width)
    return rows, dense.features(texts, width, seed=1)[0], gradient, mask


def run(
    kernel: ModuleType,
    patches: Tensor,
    texts: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    pool: str,
    temperature: float = 0.1,
) -> list[Tensor]:
    """[pooled, saved, d_patches, d_texts]."""
    shape = patches.shape[0], texts.shape[0]
    pooled, saved = texts.new_empty(shape), texts.new_empty(shape, dtype=tiles.saved_dtype(pool, patches))
    kernel.pool_scores(patches, texts, mask, pool, temperature, pooled, saved)
    d_patches, d_texts = torch.zeros_like(patches, dtype=texts.dtype), torch.zeros_like(texts)
    settings = mask, pool, temperature, pooled, saved, gradient.to(texts.dtype)
    kernel.pool_backward(patches, texts, *settings, d_patches, d_texts)
    return [pooled, saved, d_patches, d_texts]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], pool: str) -> None:
    patches, texts, gradient, mask = batch(*shape)
    for padding in (None, mask):
        for temperature in (0.001, 0.1, 20.0) if pool == "softmax" else (0.1,):
            options = padding, pool, temperature
            exact = run(tiles, patches, texts, gradient, *options)
            plain, ours = (
                run(kernel, patches.float(), texts.float(), gradient, *options) for kernel in (tiles, native_patch_text)
            )
            names = "pooled", "saved", "d_patches", "d_texts"
            for name, want, peer, have in zip(names, exact, plain, ours, strict=True):
                error, theirs = ((each.double() - want).norm() for each in (have, peer))
                allowed = (3 if name.startswith("d_") else 2) * theirs + 2e-7 * want.double().norm()
                assert error <= allowed, (name, temperature, error, theirs)


@pytest.mark.parametrize("pool", POOLS)
def test_large_scores(pool: str) -> None:
    patches, texts, gradient, mask = batch(3, 40, 21, 8)
    results = [
        run(kernel, patches.to(dtype) * 1e3, texts.to(dtype), gradient, mask, pool, 1.0)
        for kernel, dtype in ((tiles, torch.float64), (tiles, torch.float32), (native_patch_text, torch.float32))
    ]
    for want, peer, have in zip(*results, strict=True):
        assert (have.double() - want).norm() <= 3 * (peer.double() - want).norm() + 2e-7 * want.double().norm()


@pytest.mark.parametrize("patches", [255, 256, 33_000])
def test_first_of_equal_patches_in_every_type(patches: int) -> None:
    features = torch.zeros(2, patches, 3)
    features[0, [1, 5, -1]] = features[1, -1] = torch.eye(3)[0]
    texts = torch.eye(3)[[0, 1, 0]]
    pooled, saved, d_patches, d_texts = run(native_patch_text, features, texts, torch.ones(2, 3), None, "max")
    assert pooled.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert (patches - saved.long()).tolist() == [[1, 0, 1], [patches - 1, 0, patches - 1]]
    assert d_patches.sum((1, 2)).tolist() == [3, 3]
    assert d_patches[0, 1].tolist() == d_patches[1, -1].tolist() == [2, 0, 0]
    assert d_texts.tolist() == [[2, 0, 0], [0, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize("pool", POOLS)
def test_padding_nan_and_infinity_as_in_plain_pytorch(pool: str) -> None:
    patches, texts, gradient, mask = batch(5, 19, 37, 6)
    patches, texts = patches.float(), texts.float()
    mask[1], gradient[1] = False, 0  # as of an image that takes no part
    mask[2, :4] = torch.tensor([False, True, True, True])
    patches[2, 0] = 1e4
    patches[3, 9], mask[3, 9] = NAN, True
    patches[4] *= 1e3
    ours = run(native_patch_text, patches, texts, gradient, mask, pool)
    expected = run(tiles, patches, texts, gradient, mask, pool)
    for have, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(have, want, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert ours[0][3].isnan().all()
    assert ours[2][3].isnan().any() == (pool == "softmax")  # else the caller's gradient is NaN
    assert not ours[2][1].any()
    assert not ours[2][2, 0].any()


@pytest.mark.parametrize("pool", POOLS)
def test_each_gradient_alone_and_added(pool: str) -> None:
    patches, texts, gradient, mask = (each if each.dtype == torch.bool else each.float() for each in batch(4, 9, 70, 5))
    pooled, saved, *both = run(native_patch_text, patches, texts, gradient, mask, pool)
    settings = mask, pool, 0.1, pooled, saved, gradient
    nothing = texts.new_zeros(0)
    d_patches, d_texts = torch.ones_like(patches), torch.ones_like(texts)
    native_patch_text.pool_backward(patches, texts, *settings, d_patches, nothing)
    native_patch_text.pool_backward(patches, texts, *settings, nothing, d_texts)
    torch.testing.assert_close([d_patches, d_texts], [each + 1 for each in both])


@pytest.mark.parametrize("pool", POOLS)
def test_strides(pool: str) -> None:
    """Parts of tables, padded rows, columns that are not neighbours."""
    patches, texts, gradient, mask = batch(6, 9, 40, 8)
    patches, texts = patches.float(), texts.float()
    expected = run(native_patch_text, patches[1::2], texts[::3], gradient[1::2, ::3], mask[1::2], pool)
    wide = torch.full((6, 9, 11), NAN)
    wide[..., :8] = patches
    shape = (3, 50)
    pooled, saved = torch.full(shape, NAN), torch.zeros(shape, dtype=expected[1].dtype)
    part = slice(7, 7 + len(texts[::3]))
    inputs = wide[1::2, :, :8], texts.t().contiguous().t()[::3], mask.t().contiguous().t()[1::2], pool, 0.1
    native_patch_text.pool_scores(*inputs, pooled[:, part], saved[:, part])
    assert pooled.isnan().sum() == 3 * 36
    found = [torch.zeros_like(each) for each in expected[2:]]
    tables = pooled[:, part], saved[:, part], gradient.float()[1::2, ::3].contiguous()
    native_patch_text.pool_backward(*inputs, *tables, *found)
    for have, want in zip([pooled[:, part], saved[:, part], *found], expected, strict=True):
        assert torch.equal(have, want)
    with pytest.raises(ValueError, match=r"strides \(1, 3\), expected neighbours in the last dimension"):
        native_patch_text.pool_scores(*inputs, torch.empty(50, 3).t()[:, part], saved[:, part])


@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_is_converted_part_by_part(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, texts, gradient, mask = batch(5, 9, 70, 8)
    texts = texts.float()
    for dtype in (torch.bfloat16, torch.float16):
        half = patches.to(dtype)
        expected = run(native_patch_text, half.float(), texts, gradient, mask, pool)
        monkeypatch.setattr(native_patch_text, "CONVERTED", 2 * 9 * 8)
        ours = run(native_patch_text, half, texts, gradient, mask, pool)
        assert all(torch.equal(have, want) for have, want in zip(ours[:3], expected[:3], strict=True))
        torch.testing.assert_close(ours[3], expected[3])


def test_threads_and_same_bits_again() -> None:
    """Several panels of texts; images that do not go into two halves."""
    patches, texts, gradient, _ = batch(7, 131, 801, 20)
    before = torch.get_num_threads()
    for pool in POOLS:
        results = []
        try:
            for threads in (1, 1, 2, 2):
                torch.set_num_threads(threads)
                results.append(run(native_patch_text, patches.float(), texts.float(), gradient, None, pool))
        finally:
            torch.set_num_threads(before)
        for one, again, two, two_again in zip(*results, strict=True):
            assert torch.equal(one, again)
            assert torch.equal(two, two_again)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    images, patches, texts, width = shape
    inputs = torch.zeros(images, patches, width), torch.zeros(texts, width), torch.zeros(images, texts)
    for pool in POOLS:
        assert not any(each.any() for each in run(native_patch_text, *inputs, None, pool))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss(pool: str, scale: float) -> None:
    patches, texts, _, mask = batch(9, 21, 18, 16)
    inputs = [patches, texts.view(9, 2, 16), torch.tensor(scale, dtype=torch.float64)]
    losses = {
        backend: lambda *each, backend=backend: PatchTextLoss(pool=pool, backend=backend, chunk_size=7)(
            *each, patch_mask=mask
        )
        for backend in ("native", "torch")
    }
    exact = dense.value_and_gradients(losses["native"], inputs)  # fp64 has no native kernels
    single = [each.float() for each in inputs]
    ours, plain = (dense.value_and_gradients(losses[backend], single) for backend in ("native", "torch"))
    assert (ours[0] - exact[0]).abs() <= 2 * (plain[0] - exact[0]).abs() + 1e-6 * exact[0]
    for want, peer, have in zip(exact[1], plain[1], ours[1], strict=True):
        assert (have - want).norm() <= 3 * (peer - want).norm() + 1e-6 * want.norm()


def test_choice_of_kernels() -> None:
    assert kernels("auto", "patch_text", torch.device("cpu")) is native_patch_text
    assert kernels("native", "patch_text") is native_patch_text


def workspace(rank: int, world_size: int) -> dict[str, int]:
    """Peak of forward and backward less the gradients; the patch scores alone would be 24.5 MiB."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((64, 196, 64), (64, 8, 64))]
    peaks = {}
    for pool in POOLS:
        loss = PatchTextLoss(pool=pool, backend="native")
        torch.autograd.grad(loss(*(each[:2] for each in leaves), 9.0), leaves)  # libraries are loaded
        peak = peak_bytes(lambda loss=loss: torch.autograd.grad(loss(*leaves, 9.0), leaves))
        peaks[pool] = peak - sum(each.nbytes for each in leaves)
    return peaks


@pytest.mark.skipif(not measurable(), reason="this system does not report a process's peak memory")
def test_workspace() -> None:
    (peaks,) = on_ranks(1, workspace)
    for pool, peak in peaks.items():
        assert peak < 4 * 2**20, f"{pool} took {peak / 2**20:.1f} MiB"
