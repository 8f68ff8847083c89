"""The operators: opcheck, torch.compile without graph breaks (one rank and two), double backward, memory, back ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import opcheck

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.exchange import Exchange
from cllip_fast.kernels import native
from cllip_fast.losses import ClipLoss, DistillClipLoss, RegionTextLoss, SigLipLoss
from cllip_fast.streaming import chunk_argument, info_nce, plan
from cllip_fast.streaming.backends import check_backend, kernels
from tests import dense
from tests.peak import measurable, peak_bytes
from tests.ranks import on_ranks


def masks(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(rows, generator=generator) < 0.7, torch.randint(0, 5, (rows,), generator=generator)


def losses(**options: object) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    features = [*dense.features(34, 16, torch.float32), torch.tensor([20.0])]
    teacher = dense.features(34, 8, torch.float32, seed=5)
    mask, ids = masks(34)
    clip, distilled = ClipLoss(gather_with_grad=True, **options), DistillClipLoss(gather_with_grad=True, **options)
    region, siglip = RegionTextLoss(**options), SigLipLoss(**options)
    return {
        "clip": (clip, features),
        "siglip": (siglip, [*features, torch.tensor(-3.0)]),
        "region": (lambda *each: region(*each, mask, ids), features),
        "distill": (lambda *each: sum(distilled(*each, *teacher, 30.0)), features),
    }


@pytest.mark.parametrize("name", losses())
def test_compiles_without_graph_breaks(name: str) -> None:
    loss, inputs = losses(backend="torch")[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(dense.value_and_gradients(compiled, inputs), dense.value_and_gradients(loss, inputs))


def test_padding_when_compiled() -> None:
    """Eager code on a CPU takes the real regions out; a compiled graph, as on a GPU, masks the padding."""
    mask, ids = masks(34)
    clean, loss = losses()["region"][1], RegionTextLoss()
    inputs = [each.masked_fill(~mask[:, None], float("nan")) for each in clean[:2]] + [clean[2]]
    compiled = torch.compile(lambda *each: loss(*each, mask, ids), fullgraph=True, backend="aot_eager")
    value, grads = dense.value_and_gradients(compiled, inputs)
    expected = dense.value_and_gradients(lambda *each: dense.region(*each, mask, ids, 0.9), clean)
    torch.testing.assert_close((value, grads), expected)
    assert not grads[0][~mask].any()
    nothing = dense.value_and_gradients(torch.compile(lambda *each: loss(*each, mask & False), backend="eager"), inputs)
    assert nothing[0] == 0
    assert not any(each.any() for each in nothing[1])


@pytest.mark.parametrize("chunk_size", [0, 13])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_padding_mask_in_the_tiles(chunk_size: int, threshold: float | None) -> None:
    mask, ids = masks(61)
    inputs = [*dense.features(61, 12), torch.tensor(80.0, dtype=torch.float64)]
    inputs[0][~mask] *= 50  # padding that would be seen if it took part
    for same in (None, ids):
        options = {"valid": mask, "ids": same, "threshold": threshold, "chunk_size": chunk_size}
        ours = dense.value_and_gradients(lambda *each, options=options: info_nce(*each, **options), inputs)
        expected = dense.value_and_gradients(
            lambda *each, same=same: dense.region(*each, mask, same, threshold), inputs
        )
        torch.testing.assert_close(ours, expected)


def assert_same(ours: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(ours[0], expected[0])
    assert all(map(torch.equal, ours[1], expected[1]))


def test_small_and_new_sizes_compile_too() -> None:
    compiled = torch.compile(ClipLoss(), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 30, 300):
        inputs = [*dense.features(rows, 8, torch.float32), torch.tensor(20.0)]
        torch.testing.assert_close(
            dense.value_and_gradients(compiled, inputs), dense.value_and_gradients(dense.clip, inputs)
        )


def test_compiles_with_a_model() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
            self.scale, self.loss = nn.Parameter(torch.tensor(2.0)), SigLipLoss()

        def forward(self, images: Tensor, texts: Tensor) -> Tensor:
            both = (nn.functional.normalize(part, dim=-1) for part in (self.image(images), self.text(texts)))
            return self.loss(*both, self.scale.exp(), None)

    model, inputs = Pair(), (torch.randn(20, 6), torch.randn(20, 5))
    expected = torch.autograd.grad(model(*inputs), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), list(model.parameters())), expected)


def test_opcheck() -> None:
    images, texts, scale = (each.requires_grad_() for each in losses()["clip"][1])
    teacher, bias = dense.features(34, 8, torch.float32, seed=5), torch.tensor(-3.0, requires_grad=True)
    flags, operators = ("", False, True, 7, "auto", True), torch.ops.cllip_fast
    opcheck(operators.info_nce.default, (images, texts, scale, None, None, None, *flags))
    opcheck(operators.info_nce.default, (images, texts, scale, *masks(34), 0.9, *flags))
    opcheck(operators.sigmoid_loss.default, (images, texts, scale, bias, "", 7, "auto", True))
    fixed = [each.detach() for each in (images, texts, scale, bias)]
    for needs in ((True, True, True, True), (False, True, False, False)):
        opcheck(operators.sigmoid_loss_and_gradients.default, (*fixed, 7, "auto", *needs))
    opcheck(operators.attach_gradient.default, (torch.tensor(1.0), images, torch.ones(34, 16)))
    opcheck(operators.distill.default, (images, texts, scale, *teacher, scale.detach(), *flags))


@pytest.mark.parametrize("name", losses())
def test_double_backward_is_refused(name: str) -> None:
    loss, inputs = losses(backend="torch")[name]
    leaf = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, *inputs[1:]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cllip_fast::\w+ is differentiable once"):
        gradient.sum().backward()


def memory(rank: int, world_size: int) -> dict[str, int]:
    """Peak of forward and backward for each loss at 6000 rows: one matrix of scores would be 144 MB."""
    rows, width = 6000, 32
    inputs = [each.requires_grad_() for each in (*dense.features(rows, width, torch.float32), torch.tensor(20.0))]
    mask, ids = masks(rows)
    teacher = dense.features(rows, width, torch.float32, seed=9)
    clip, distilled = ClipLoss(), DistillClipLoss()
    runs = {
        "clip": lambda: clip(*inputs).backward(),
        "siglip": lambda: SigLipLoss()(*inputs, torch.tensor(-3.0, requires_grad=True)).backward(),
        "region": lambda: RegionTextLoss()(*inputs, mask, ids).backward(),
        "distill": lambda: sum(distilled(*inputs, *teacher, 30.0)).backward(),
    }
    return {name: peak_bytes(run) for name, run in runs.items()}


@pytest.mark.skipif(not measurable(), reason="this system does not report a process's peak memory")
def test_peak_memory_is_tiles_and_features() -> None:
    (peaks,) = on_ranks(1, memory)
    rows = 6000  # the dense losses keep 2.5 matrices of this size and more
    for name, peak in peaks.items():
        assert peak < rows * rows * 4 / 2, f"{name} took {peak / 2**20:.1f} MiB"


def test_no_tensor_is_as_large_as_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small tiles, every tile buffer stays within its budget, and features are the largest tensors."""
    from cllip_fast.kernels import block

    monkeypatch.setattr(block, "TILE_ELEMENTS", 1000)
    sizes = []
    original = block.Workspace.tile
    monkeypatch.setattr(
        block.Workspace, "tile", lambda self, *each: (sizes.append(each[1] * each[2]), original(self, *each))[1]
    )
    for loss, inputs in losses(chunk_size=11).values():
        dense.value_and_gradients(loss, inputs)
    assert max(sizes) <= 1000
    assert max(sizes) < 34 * 34


def on_two_ranks(rank: int, world_size: int) -> None:
    for name, (loss, inputs) in losses(group=dist.group.WORLD).items():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        ours, expected = dense.value_and_gradients(compiled, inputs), dense.value_and_gradients(loss, inputs)
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")
    # Padding masks across ranks, with different numbers of rows.
    counts, chosen = (20, 14), slice(20 * rank, 20 + 14 * rank)
    mask, ids = masks(sum(counts))
    inputs = [*dense.features(sum(counts), 12), torch.tensor(50.0, dtype=torch.float64)]
    expected, expected_grads = dense.value_and_gradients(lambda *each: dense.region(*each, mask, ids, 0.5), inputs)
    options = {"valid": mask[chosen], "ids": ids[chosen], "threshold": 0.5, "group": "world", "chunk_size": 6}
    own = [inputs[0][chosen], inputs[1][chosen], inputs[2]]
    value, grads = dense.value_and_gradients(lambda *each: info_nce(*each, **options), own)
    torch.testing.assert_close(value, expected)
    for grad, reference in zip(grads[:2], expected_grads[:2], strict=True):
        torch.testing.assert_close(grad, world_size * reference[chosen])
    torch.testing.assert_close(grads[2], expected_grads[2])
    # DDP averages gradients over ranks: with the full-batch loss that is the gradient of one process with all rows.
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    data = torch.randn(2, 5 * world_size, 6)
    single = torch.autograd.grad(dense.clip(model(data[0]), model(data[1]), 3.0), list(model.parameters()))
    parallel = nn.parallel.DistributedDataParallel(model)
    own = data[:, 5 * rank : 5 * rank + 5]
    ClipLoss(gather_with_grad=True, group=dist.group.WORLD)(*parallel(own), 3.0).backward()
    torch.testing.assert_close(tuple(each.grad for each in model.parameters()), single)
    assert Exchange("world").world_size == 2


def test_compiles_masks_and_ddp_on_two_ranks() -> None:
    on_ranks(2, on_two_ranks)


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    for loss, inputs in losses(backend="torch").values():
        again = dense.value_and_gradients(lambda *each, loss=loss: checkpoint(loss, *each, use_reentrant=False), inputs)
        assert_same(again, dense.value_and_gradients(loss, inputs))


def test_the_same_call_gives_the_same_bits() -> None:
    for loss, inputs in losses(chunk_size=9).values():
        assert_same(dense.value_and_gradients(loss, inputs), dense.value_and_gradients(loss, inputs))


def test_plan() -> None:
    assert plan.rows_in_chunk((8192,), 0) == 2048
    assert plan.rows_in_chunk((2049,), 0) == 1025
    assert plan.rows_in_chunk((5000, 3000), 0) * 2 <= plan.CHUNK_COLUMNS
    assert plan.rows_in_chunk((100, 7), 10) == 5
    assert plan.rows_in_chunk((100, 7, 3), 2) == 1
    assert plan.rows_in_chunk((0,), 0) == 1
    texts = torch.zeros(3, 4)
    assert plan.gathered_buffer(texts, (2, 3), keep=True).numel() == 24
    assert plan.gathered_buffer(texts, (1, 3), keep=True).numel() == 0
    assert plan.gathered_buffer(texts, (2, 3), keep=False).numel() == 0
    assert plan.gathered_buffer(texts, (2, plan.KEEP_BYTES), keep=True).numel() == 0


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert check_backend("auto", "info_nce") == "auto"
    best_on_cpu = "native" if native.available() else "torch"
    assert kernels("auto", "info_nce", cpu) is kernels(best_on_cpu, "info_nce")
    assert kernels("auto", "distill", gpu) is kernels("torch", "distill")
    with pytest.raises(InputError, match="backend is 'triton', which distill does not have; expected one of auto"):
        check_backend("triton", "distill")
    assert kernels("auto", "patch_text", cpu) is kernels(best_on_cpu, "patch_text")
    if extras.probe("triton"):
        assert check_backend("triton", "patch_text") == "triton"
        assert kernels("triton", "patch_text").__name__.endswith("patch_text.triton")
    assert kernels("auto", "patch_text", gpu) is kernels("torch", "patch_text")  # until a GPU has run Triton's tests
    monkeypatch.setattr(extras, "probe", lambda name: None)
    assert kernels("auto", "patch_text", gpu) is kernels("torch", "patch_text")
    with pytest.raises(InputError, match="backend='triton' needs triton, which cannot be imported here: pip install"):
        check_backend("triton", "patch_text")
    for bad in (-1, 2.5, True, "all"):
        with pytest.raises(InputError, match="chunk_size is"):
            chunk_argument(bad)
    assert chunk_argument(None) == chunk_argument(0) == plan.AUTO
