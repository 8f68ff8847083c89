"""Checks of the Triton kernels of patch–text, on a GPU, or on CPU tensors where this module is run by itself:

TRITON_INTERPRET=1 python -m tests.kernels.triton_patch_text_checks
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from cllip_fast.kernels.patch_text import contrast, tiles, triton_backward, triton_forward
from cllip_fast.kernels.patch_text import triton as kernels
from cllip_fast.kernels.patch_text.contrast import Pairs, Pulls
from cllip_fast.losses import PatchTextLoss
from tests import dense, dense_local

INF = float("inf")


def pairs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, masked: bool) -> dict[str, Tensor | None]:
    """Features [B, P, D] and [t, D], a ragged mask, an upstream gradient [B, t]."""
    images, patches, texts, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    vectors = dense.features(images * patches, width, dtype, seed=1)[0].view(images, patches, width)
    if patches > 3:
        vectors[:, 3] = vectors[:, -1] = vectors[:, 1]  # ties, in one tile and in two
    mask = torch.rand(images, patches, generator=generator) < 0.6
    mask[:, patches // 2] = True
    gradient = torch.randn(images, texts, generator=generator)
    values = {
        "patches": vectors,
        "texts": dense.features(texts, width, dtype, seed=2)[1],
        "mask": mask if masked else None,
        "gradient": gradient,
    }
    return {name: None if each is None else each.to(device) for name, each in values.items()}


def exact_scores(v: dict[str, Tensor | None]) -> Tensor:
    """[B, P, t] in fp64, −inf for padded patches."""
    scores = torch.einsum("ipd,td->ipt", v["patches"].double(), v["texts"].double())
    return scores if v["mask"] is None else scores.masked_fill(~v["mask"][..., None], -INF)


def negatives(v: dict[str, Tensor | None]) -> Pairs:
    """Texts of images that are not here: nothing is excluded."""
    images, texts = v["gradient"].shape
    device = v["gradient"].device
    owner = torch.full((texts,), images, device=device)
    return Pairs(owner, torch.ones(images, 0, dtype=torch.bool, device=device))


def forward(v: dict[str, Tensor | None], pool: str, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    shape = v["gradient"].shape
    pooled = v["gradient"].new_full(shape, 777)
    saved = torch.full(shape, 7, dtype=kernels.saved_dtype(pool, v["patches"]), device=pooled.device)
    into = pooled.new_tensor(10.0), negatives(v), pooled, saved, pooled.new_zeros(shape[1])
    sums = kernels.forward_block(v["patches"], v["texts"], v["mask"], pool, temperature, *into)
    for dim, sum in zip((1, 0), sums, strict=True):
        # What the kernel sums is what it pools.
        torch.testing.assert_close(
            sum.double(), (10 * pooled.double()).logsumexp(dim), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    return pooled, saved


def backward(v: dict[str, Tensor | None], pool: str, temperature: float, *values: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to accumulators that hold 1."""
    added = [torch.ones(v[name].shape, device=values[0].device) for name in ("patches", "texts")]
    kernels.pool_backward(v["patches"], v["texts"], v["mask"], pool, temperature, *values, v["gradient"], *added)
    return added[0] - 1, added[1] - 1


def assert_within(found: Tensor, expected: Tensor, allowed: Tensor | float) -> None:
    excess = (found.double() - expected).abs() - allowed
    assert found.isfinite().all()
    assert excess.numel() == 0 or excess.max() <= 0, excess.max()


def check_max(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, masked: bool) -> None:
    v = pairs(shape, dtype, device, masked)
    scores, count = exact_scores(v), shape[1]
    pooled, saved = forward(v, "max")
    best = count - saved.long()
    assert_within(pooled, scores.amax(1), 1e-5)
    chosen = scores.gather(1, best[:, None])[:, 0]
    assert_within(chosen, scores.amax(1), 1e-5)
    # Of equal patches the first real one.
    first = torch.where(scores > chosen[:, None] - 1e-12, torch.arange(count, device=device)[:, None], count).amin(1)
    assert torch.equal(best, first)

    choice = torch.zeros_like(scores).scatter_(1, best[:, None], v["gradient"].double()[:, None])
    d_patches, d_texts = backward(v, "max", 0.1, pooled, saved)
    assert_within(d_patches, torch.einsum("ipt,td->ipd", choice, v["texts"].double()), 1e-5)
    assert_within(d_texts, torch.einsum("ipt,ipd->td", choice, v["patches"].double()), 1e-5)


def check_softmax(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, masked: bool, tau: float) -> None:
    v = pairs(shape, dtype, device, masked)
    scores = exact_scores(v)
    weights = torch.softmax(scores / tau, 1)
    finite = scores.masked_fill(scores == -INF, 0)
    mean = (weights * finite).sum(1)
    pooled, saved = forward(v, "softmax", tau)
    assert_within(pooled, mean, 1e-5)
    assert_within(saved, (scores / tau).logsumexp(1), 1e-5 / tau)

    exact = v["gradient"].double()[:, None] * weights * (1 + (finite - mean[:, None]) / tau)
    arguments = (v["patches"], v["texts"], v["mask"], tau, pooled, saved, v["gradient"])
    tile = triton_backward.score_gradients(*arguments).view_as(exact)
    assert tile.dtype == dtype
    epsilon = max(torch.finfo(dtype).eps, 1e-5 / tau)
    assert_within(tile, exact, epsilon * exact.abs() + 1e-6)
    d_patches, d_texts = backward(v, "softmax", tau, pooled, saved)
    for found, form, other in ((d_patches, "ipt,td->ipd", "texts"), (d_texts, "ipt,ipd->td", "patches")):
        side = v[other].double()
        allowed = epsilon * torch.einsum(form, exact.abs(), side.abs()) + 1e-5
        assert_within(found, torch.einsum(form, exact, side), allowed)


def check_extremes(device: str) -> None:
    """Large scores, a NaN, an image without a real patch, nothing at all."""
    v = pairs((3, 18, 17, 8), torch.float32, device, True)
    v["patches"] *= 1e4
    v["patches"][0, 1] = float("nan")
    v["mask"][0] = True
    v["mask"][1] = False
    for pool in ("max", "softmax"):
        pooled, saved = forward(v, pool, 0.01)
        assert pooled[0].isnan().all()
        assert (pooled[1] == -INF).all()
        torch.testing.assert_close(pooled[2].double(), exact_scores(v)[2].amax(0), rtol=1e-5, atol=0)
        v["gradient"][1] = 0
        into = torch.zeros_like(v["patches"]), torch.zeros_like(v["texts"])
        kernels.pool_backward(v["patches"], v["texts"], v["mask"], pool, 0.01, pooled, saved, v["gradient"], *into)
        assert not into[0][1].any()
        assert into[0][2].isfinite().all()
        for shape in ((0, 4, 3, 5), (3, 4, 0, 5)):
            nothing = pairs(shape, torch.float32, device, False)
            values = forward(nothing, pool)
            assert not any(each.any() for each in backward(nothing, pool, 0.1, *values))


def check_layouts(device: str) -> None:
    """The same bits alone for either side; the same numbers for slices of larger tensors and for transposed memory."""
    v = pairs((2, 5, 19, 20), torch.float32, device, True)
    nothing = torch.empty(0, device=device)
    for pool in ("max", "softmax"):
        values = forward(v, pool)
        expected = (*values, *backward(v, pool, 0.1, *values))
        arguments = (v["patches"], v["texts"], v["mask"], pool, 0.1, *values, v["gradient"])
        alone = torch.ones_like(v["patches"]), torch.ones_like(v["texts"])
        kernels.pool_backward(*arguments, alone[0], nothing)
        kernels.pool_backward(*arguments, nothing, alone[1])
        assert all(map(torch.equal, expected[2:], (each - 1 for each in alone)))
        for odd in (
            {name: torch.cat([v[name]] * 2, -1)[..., : v[name].shape[-1]] for name in ("patches", "texts")},
            {name: v[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in ("patches", "texts")},
        ):
            moved = v | odd
            values = forward(moved, pool)
            # Library products of another layout may add in another order.
            torch.testing.assert_close((*values, *backward(moved, pool, 0.1, *values)), expected, rtol=1e-5, atol=1e-5)


def check_contrast(
    shape: tuple[int, int, int, int],
    each: int,
    pool: str,
    scale: float,
    device: str,
    dtype: torch.dtype = torch.float32,
    masked: bool = True,
    filtered: bool = False,
    seed: int = 0,
) -> None:
    """Sums, positives and the gradient of the pooled scores, with every exclusion, against the fp64 specification.

    Args:
        shape: (images, patches, texts, D); the texts belong to some images, to images that are not here, or to none.
        each: texts of an image, whose ids exclude the image.
    """
    images, patches, texts, width = shape
    generator = torch.Generator().manual_seed(seed)
    v = pairs(shape, dtype, device, masked)
    if masked and patches > 1:
        v["mask"][images // 2, : patches // 2 + 1] = False  # the first real patch may lie in a later tile
    if masked and images > 1:
        v["mask"][0] = False  # takes no part
    owner = torch.randint(-1, images + 1, (texts,), generator=generator)
    owner[owner == 0] = -1
    ids, own_ids = (torch.randint(0, 3 * images, size, generator=generator) for size in ((texts,), (images, each)))
    own_valid = torch.rand(images, each, generator=generator) < 0.7
    own_texts = dense.features(images * each, width, dtype, seed=2)[1].view(images, each, width)
    here = {"owner": owner, "own_valid": own_valid, "ids": ids, "own_ids": own_ids}
    here |= {"own_texts": own_texts} if filtered else {}
    here = {name: value.to(device) for name, value in here.items()}
    found, exact = [], []
    for into, kernel, kind in ((found, kernels, torch.float32), (exact, tiles, torch.float64)):
        convert = (lambda x: x.double()) if kernel is tiles else (lambda x: x)
        a = torch.tensor(scale, dtype=kind, device=device)
        pooled = torch.full((images, texts), 777, dtype=kind, device=device)
        saved = torch.full((images, texts), 7, dtype=tiles.saved_dtype(pool, convert(v["patches"])), device=device)
        positive = pooled.new_zeros(texts)
        related = {name: convert(value) if name == "own_texts" else value for name, value in here.items()}
        arguments = pool, 0.1, a, Pairs(**related, threshold=0.8), pooled, saved, positive
        rows, columns = kernel.forward_block(convert(v["patches"]), convert(v["texts"]), v["mask"], *arguments)
        numbers = torch.Generator().manual_seed(seed)
        weights = (torch.rand(size, generator=numbers, dtype=torch.float64) for size in (images, texts, texts))
        row_weight, column_weight, d_positive = (each.to(device, kind) for each in weights)
        rows_finite, columns_finite = (each.masked_fill(each == -INF, 0) for each in (rows, columns))
        pulls = Pulls(a, rows_finite, row_weight, columns_finite, column_weight, d_positive, here["owner"])
        gradient = (contrast if kernel is tiles else kernel).pooled_gradient(pooled, pulls, a)
        into += [rows, columns, pooled, positive, *gradient]
    for name, have, want in zip(("rows", "columns", "pooled", "positive", "G", "Σ G S"), found, exact, strict=True):
        assert have.dtype == torch.float32
        # A logit is off by its product's rounding, and so, relatively, is its exponential.
        allowed = 1e-5 * (scale if name in ("rows", "columns") else scale**2 if name in ("G", "Σ G S") else 1)
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=allowed, msg=lambda text: f"{name}: {text}")  # noqa: B023


def check_loss(pool: str, scale: float, dtype: torch.dtype, device: str, images: int = 7) -> None:
    """The loss and every gradient through the engine, with masks, ids and the conflict filter."""
    patches, texts, width = 6, 3, 20
    generator = torch.Generator().manual_seed(4)
    vectors = dense.features(images * patches, width, dtype, seed=3)[0].view(images, patches, width)
    ids = torch.randint(0, 9, (images, texts), generator=generator)
    mask = torch.rand(images, texts, generator=generator) < 0.7
    patch_mask = torch.rand(images, patches, generator=generator) < 0.7
    patch_mask[:, 0] = True
    names = dense.features(9, width, dtype, seed=5)[0][ids]
    inputs = [each.to(device) for each in (vectors, names, torch.tensor(scale, dtype=dtype))]
    mask, ids, patch_mask = (each.to(device) for each in (mask, ids, patch_mask))
    loss = PatchTextLoss(pool=pool, filter_threshold=0.9, backend="triton", chunk_size=10)

    def reference(v: Tensor, t: Tensor, a: Tensor) -> Tensor:
        options = {"ids": ids.cpu(), "patch_mask": patch_mask.cpu(), "pool": pool, "threshold": 0.9}
        return dense_local.patch_text(v.cpu(), t.cpu(), a.cpu(), mask.cpu(), **options).to(device)

    dense.assert_as_good_as_dense(lambda *each: loss(*each, mask, ids, patch_mask), reference, inputs)


def check_nothing(device: str) -> None:
    """No valid text, no patch in any image, no text, no image: loss and gradients are 0."""
    for images, texts, real, valid in (
        (3, 2, True, False),
        (3, 2, False, True),
        (3, 0, True, True),
        (0, 2, True, True),
    ):
        for pool in ("max", "softmax"):
            inputs = [torch.rand(images, each, 8, device=device, requires_grad=True) for each in (5, texts)]
            scale = torch.tensor(9.0, device=device, requires_grad=True)
            masks = {
                "mask": torch.full((images, texts), valid, device=device),
                "patch_mask": torch.full((images, 5), real, device=device),
            }
            loss = PatchTextLoss(pool=pool, backend="triton")(*inputs, scale, **masks)
            assert loss == 0
            assert not any(each.any() for each in torch.autograd.grad(loss, [*inputs, scale]))


def fuzz(cases: int) -> None:
    """Small random problems."""
    for seed in range(cases):
        generator = random.Random(seed)
        images, patches, texts = (
            generator.choice((1, 2, 5)),
            generator.choice((1, 16, 31, 49)),
            generator.choice((1, 7, 40)),
        )
        shape = images, patches, texts, generator.choice((1, 8, 33))
        triton_forward.WAVES = generator.choice((1, 16))  # several images a program, or one
        options = {"masked": generator.random() < 0.7, "filtered": generator.random() < 0.5, "seed": seed}
        # PyTorch's product, of the filter, has no fp16 with a result in fp32 on a CPU.
        dtype = torch.float32 if options["filtered"] else torch.float16
        scale = generator.choice((1.0, 20.0, 100.0))
        check_contrast(
            shape, generator.choice((1, 3, 9)), generator.choice(("max", "softmax")), scale, "cpu", dtype, **options
        )


def main() -> None:
    """Everything in the interpreter."""
    for dtype, masked in ((torch.float32, False), (torch.float32, True), (torch.float16, True)):
        for shape in ((1, 1, 1, 1), (2, 17, 5, 12), (1, 33, 17, 40), (2, 5, 123, 32)):
            check_max(shape, dtype, "cpu", masked)
            check_softmax(shape, dtype, "cpu", masked, 0.1)
    check_max((1, 257, 2, 16), torch.float32, "cpu", False)  # the number of the best patch takes two bytes
    check_max((1, 20, 3, 1536), torch.float16, "cpu", True)
    check_softmax((2, 17, 5, 12), torch.float32, "cpu", True, 0.01)
    check_extremes("cpu")
    check_layouts("cpu")
    for pool in ("max", "softmax"):
        check_contrast((5, 33, 40, 8), 9, pool, 100.0, "cpu")
        check_contrast((3, 49, 17, 64), 2, pool, 1.0, "cpu", filtered=True)
    fuzz(8)
    for pool, scale in (("max", 100.0), ("softmax", 1.0), ("softmax", 100.0)):
        check_loss(pool, scale, torch.float32, "cpu", images=4)
    check_nothing("cpu")


if __name__ == "__main__":
    main()
