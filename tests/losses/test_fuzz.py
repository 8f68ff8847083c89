"""Random sizes, types, options and layouts against the dense fp64 losses; a failure prints its seeded case."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.kernels import native
from cllip_fast.losses import ClipLoss, PatchTextLoss, RegionTextLoss, SigLipLoss
from tests import dense, dense_local

Loss = Callable[..., Tensor]
CASES = 15
"""Of each loss."""


@dataclasses.dataclass
class Case:
    """Drawn parameters. Rows are images for PatchTextLoss, regions for RegionTextLoss."""

    seed: int
    rows: int
    width: int
    dtype: torch.dtype
    scale: float
    bias: float | None
    share: float | None  # of the texts that are real; None: no mask
    names: int | None  # different ids; None: no ids
    threshold: float | None
    chunk_size: int | None
    backend: str
    upstream: float
    layout: str
    texts: int  # of an image, and
    patches: int
    pool: str

    @classmethod
    def draw(cls, seed: int, most_rows: int, backends: tuple[str, ...], least_width: int = 1) -> Case:
        pick = random.Random(seed)
        dtype = pick.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16])
        # In bf16 a text near the threshold falls on this side or that.
        threshold = None if dtype == torch.bfloat16 else pick.choice([None, -0.5, 0.3, 0.9])
        return cls(
            seed=seed,
            rows=pick.choice([0, 1, 2] + [pick.randint(3, most_rows) for _ in range(6)]),
            width=pick.choice([least_width, 2, pick.randint(3, 70), pick.randint(3, 70)]),
            dtype=dtype,
            scale=10 ** pick.uniform(-1, 2),
            bias=pick.choice([None, pick.uniform(-12, 3)]),
            share=pick.choice([None, 0.0, 0.3, 0.8, 1.0]),
            names=pick.choice([None, 1, 4, 40]),
            threshold=threshold,
            chunk_size=pick.choice([None, 1, 7, 64, 1000]),
            backend=pick.choice(backends),
            upstream=pick.choice([1.0, -2.5, 30.0, 0.01]),
            layout=pick.choice(["contiguous", "columns", "slices"]),
            texts=pick.randint(1, 4),
            patches=pick.randint(1, 20),
            pool=pick.choice(["max", "softmax"]),
        )

    def features(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Of each shape [..., width], with norms from 0.5 to 1: in few dimensions unit ones would be all alike."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.randn(*shape, self.width, dtype=torch.float64, generator=generator) for shape in shapes]
        norms = [torch.rand(*shape, 1, dtype=torch.float64, generator=generator) / 2 + 0.5 for shape in shapes]
        return [(F.normalize(each, dim=-1) * norm).to(self.dtype) for each, norm in zip(drawn, norms, strict=True)]

    def masks(self, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """(mask, ids) of this shape."""
        generator = torch.Generator().manual_seed(self.seed)
        mask = None if self.share is None else torch.rand(shape, generator=generator) < self.share
        return mask, None if self.names is None else torch.randint(0, self.names, shape, generator=generator)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor([value] if self.seed % 2 else value).to(self.dtype)

    def laid_out(self, value: Tensor) -> Tensor:
        """The same numbers, in memory as the case has it."""
        if self.layout == "columns" and value.dim() > 1:
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.stack([value, value], -1)[..., 0] if self.layout == "slices" else value


def check(case: Case, loss: Loss, reference: Loss, inputs: list[Tensor]) -> None:
    """Value and gradients by the rule of `tests/dense.py`; then one gradient alone, of a weighted loss; then none."""
    print(case)  # pytest shows it if the case fails

    def ours(*each: Tensor) -> Tensor:
        return loss(*map(case.laid_out, each))

    value, gradients = dense.value_and_gradients(ours, inputs)
    if inputs[0].numel():
        dense.assert_as_good_as_dense(ours, reference, inputs)
    else:
        assert value == 0
        assert not any(each.any() for each in gradients)
    needed = case.seed % len(inputs)
    leaves = [each.clone().requires_grad_(index == needed) for index, each in enumerate(inputs)]
    (alone,) = torch.autograd.grad(case.upstream * ours(*leaves), leaves[needed])
    torch.testing.assert_close(alone / case.upstream, gradients[needed])
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), value)


BACKENDS = ("auto", "torch", "native") if native.available() else ("auto", "torch")


@pytest.mark.parametrize("seed", range(CASES))
def test_clip(seed: int) -> None:
    case = Case.draw(seed, 200, BACKENDS)
    loss = ClipLoss(backend=case.backend, chunk_size=case.chunk_size)
    check(case, loss, dense.clip, [*case.features((case.rows,), (case.rows,)), case.scalar(case.scale)])


@pytest.mark.parametrize("seed", range(100, 100 + CASES))
def test_siglip(seed: int) -> None:
    case = Case.draw(seed, 200, BACKENDS)
    loss = SigLipLoss(backend=case.backend, chunk_size=case.chunk_size)
    scalars = [case.scalar(each) for each in (case.scale, case.bias) if each is not None]
    check(case, loss, dense.siglip, [*case.features((case.rows,), (case.rows,)), *scalars])


@pytest.mark.parametrize("seed", range(200, 200 + CASES))
def test_region_text(seed: int) -> None:
    case = Case.draw(seed, 200, BACKENDS)
    mask, ids = case.masks((case.rows,))
    loss = RegionTextLoss(filter_threshold=case.threshold, backend=case.backend, chunk_size=case.chunk_size)
    check(
        case,
        lambda *each: loss(*each, mask, ids),
        lambda *each: dense.region(*each, mask, ids, case.threshold),
        [*case.features((case.rows,), (case.rows,)), case.scalar(case.scale)],
    )


@pytest.mark.parametrize("seed", range(300, 300 + CASES))
def test_patch_text(seed: int) -> None:
    case = Case.draw(seed, 8, ("auto", "torch"), least_width=2)  # in one dimension bf16 patches have equal scores
    images = (case.rows, case.texts)
    mask, ids = case.masks(images)
    real = torch.ones(images, dtype=torch.bool) if mask is None else mask
    options = {"backend": case.backend, "chunk_size": case.chunk_size}
    loss = PatchTextLoss(pool=case.pool, filter_threshold=case.threshold, **options)
    check(
        case,
        lambda *each: loss(*each, mask, ids),
        lambda *each: dense_local.patch_text(*each, real, ids=ids, pool=case.pool, threshold=case.threshold),
        [*case.features((case.rows, case.patches), images), case.scalar(case.scale)],
    )
