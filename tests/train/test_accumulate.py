"""Accumulation over micro-batches: value and every gradient are those of one large batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError
from cllip_fast.losses import ClipLoss, CllipLoss, SigLipLoss
from cllip_fast.models import create_model
from cllip_fast.train import checkpoint, distributed
from cllip_fast.train.accumulate import accumulate
from cllip_fast.train.config import parse
from cllip_fast.train.main import train
from tests.ranks import on_ranks

PARTS = ("region", "grounding", "patch")
Batch = tuple[Tensor, ...]


class Towers(nn.Module):
    """As OpenCLIP's models answer: the scale's exponential, the bias parameter itself, both of shape [1]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 5))
        self.text = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 5))
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.logit_bias = nn.Parameter(torch.tensor([-1.5]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(batch[0]), dim=-1),
            "text_features": F.normalize(self.text(batch[1]), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def pairs(count: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype) for width in (6, 4))


def scenes(count: int) -> Batch:
    """images, text, boxes, region_text, region_mask: ragged, repeated region texts, images 4 to 7 without regions."""
    generator = torch.Generator().manual_seed(2)
    low = torch.rand(count, 3, 2, generator=generator, dtype=torch.float64) * 0.5
    mask = torch.rand(count, 3, generator=generator) < 0.7
    mask[0, 0], mask[4:8] = True, False
    return (
        torch.randn(count, 3, 24, 24, generator=generator, dtype=torch.float64),
        torch.randint(1, 30, (count, 9), generator=generator),
        torch.cat([low, low + 0.4], -1) * mask[..., None],
        torch.randint(1, 30, (4, 5), generator=generator)[torch.randint(4, (count, 3), generator=generator)]
        * mask[..., None],
        mask,
    )


def cllip() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 24, "vocab_size": 30, "text_length": 9, "embed_dim": 12, "vision_width": 16,
             "vision_depth": 1, "vision_heads": 2, "text_width": 8, "text_heads": 2}  # fmt: skip
    return create_model("tiny", **sizes).double()


def split(batch: Batch, *sizes: int) -> list[Batch]:
    return list(zip(*(each.split(list(sizes)) for each in batch), strict=True))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def plain(model: nn.Module, loss: Callable[..., Tensor], outputs: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Value and gradients by ordinary autograd."""
    value = loss(**outputs)
    value.backward()
    wanted = gradients(model)
    model.zero_grad()
    return value.detach(), wanted


def joined(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.cat([each[name] for each in outputs]) if value.shape not in ((), (1,)) else value
        for name, value in outputs[-1].items()
    }


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (7, 1, 4), (12,)])
def test_equals_one_large_batch(loss: nn.Module, sizes: tuple[int, ...]) -> None:
    model, batch = Towers().double(), pairs(12)
    value, wanted = plain(model, loss, model(batch))
    parts = accumulate(model, loss, split(batch, *sizes))
    torch.testing.assert_close(parts, {"loss": value}, rtol=1e-12, atol=0)
    assert not parts["loss"].requires_grad
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)
    assert wanted["logit_scale"].abs() > 1e-3
    assert (wanted["logit_bias"].abs() > 1e-3) == isinstance(loss, SigLipLoss)


@pytest.mark.parametrize("options", [{}, {"pool": "softmax", "grounding": "l1_giou", "other_images": True}])
def test_the_whole_cllip_loss(options: dict) -> None:
    model, batch, loss = cllip(), scenes(12), CllipLoss(**options)

    def forward(batch: Batch) -> dict:
        return model(*batch, parts=PARTS)

    value, wanted = plain(model, loss, forward(batch))
    parts = accumulate(forward, lambda **outputs: loss(**outputs, output_dict=True), split(batch, 4, 4, 4))
    assert len(parts) == 5
    torch.testing.assert_close(sum(parts.values()), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)
    assert wanted["logit_scale"] != 0
    assert wanted["region_logit_scale"] != 0


def test_two_forwards_a_micro_batch_the_first_without_graph_and_one_loss() -> None:
    model, calls = Towers().double(), []

    def forward(batch: Batch) -> dict[str, Tensor]:
        calls.append(("forward", len(batch[0]), torch.is_grad_enabled()))
        return model(batch)

    def loss(**outputs: Tensor) -> Tensor:
        calls.append(("loss", len(outputs["image_features"]), torch.is_grad_enabled()))
        return ClipLoss()(**outputs)

    accumulate(forward, loss, split(pairs(12), 12))
    assert calls == [("forward", 12, True), ("loss", 12, True)]
    calls.clear()
    accumulate(forward, loss, split(pairs(12), 7, 5))
    assert calls == [("forward", 7, False), ("forward", 5, False), ("loss", 12, True),
                     ("forward", 7, True), ("forward", 5, True)]  # fmt: skip


def test_gradients_are_added() -> None:
    model, batch = Towers().double(), pairs(6)
    _, wanted = plain(model, SigLipLoss(), model(batch))
    for _ in range(2):
        accumulate(model, SigLipLoss(), split(batch, 3, 3))
    twice = {name: 2 * gradient for name, gradient in wanted.items()}
    torch.testing.assert_close(gradients(model), twice, rtol=1e-9, atol=1e-12)


def test_parameters_of_the_loss_count_once() -> None:
    model, batch, weight = Towers().double(), pairs(6), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    value = accumulate(model, lambda **outputs: weight * ClipLoss()(**outputs), split(batch, 2, 2, 2))["loss"]
    torch.testing.assert_close(weight.grad, value / 1.5)


def test_outputs_without_a_gradient() -> None:
    """A frozen tower, a scale that is a constant, integers, and what is no tensor at all."""
    model, batch = Towers().double(), pairs(6)
    model.image.requires_grad_(False)

    def forward(batch: Batch) -> dict:
        return model(batch) | {"logit_scale": torch.tensor(7.0), "ids": torch.arange(len(batch[0])), "grid": (2, 3)}

    def loss(ids: Tensor, grid: tuple[int, int], logit_scale: Tensor, **outputs: Tensor) -> Tensor:
        assert ids.tolist() == [0, 1, 2] * 2
        assert grid == (2, 3)
        return SigLipLoss()(**outputs, logit_scale=logit_scale)

    _, wanted = plain(model, SigLipLoss(), model(batch) | {"logit_scale": torch.tensor(7.0)})
    accumulate(forward, loss, split(batch, 3, 3))
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)
    assert wanted["image.0.weight"] is None
    assert wanted["logit_scale"] is None


def test_dropout_draws_the_same_masks_twice_and_leaves_the_generator_where_one_pass_would() -> None:
    model, batches = Towers(dropout=0.5).double(), split(pairs(12), 4, 4, 4)
    torch.manual_seed(3)
    value, wanted = plain(model, ClipLoss(), joined([model(batch) for batch in batches]))
    after = torch.rand(4)
    torch.manual_seed(3)
    parts = accumulate(model, ClipLoss(), batches)
    assert torch.equal(torch.rand(4), after)
    torch.testing.assert_close(parts["loss"], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_dropout_on_a_gpu() -> None:
    model = Towers(dropout=0.5).double().cuda()
    batches = split(tuple(each.cuda() for each in pairs(12)), 4, 4, 4)
    torch.manual_seed(3)
    _, wanted = plain(model, ClipLoss(), joined([model(batch) for batch in batches]))
    after = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    accumulate(model, ClipLoss(), batches)
    assert torch.equal(torch.rand(4, device="cuda"), after)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside_forward_or_around_everything(outside: bool) -> None:
    """Around everything, the casts of weights outlive pass 1: they must not reach pass 2 without a graph."""
    model, batches = Towers(), split(pairs(12, torch.float32), 4, 4, 4)

    def forward(batch: Batch) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    value, wanted = plain(model, ClipLoss(), joined([forward(batch) for batch in batches]))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        parts = accumulate(model if outside else forward, ClipLoss(), batches)
    torch.testing.assert_close(parts["loss"], value, rtol=1e-5, atol=0)
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).norm() <= 0.05 * wanted[name].norm(), name


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    model, loss = cllip(), CllipLoss()
    one, two = split(scenes(8), 4, 4)
    fewer = (*two[:2], *(each[:, :2] for each in two[2:]))
    message = r"output \w+ of micro-batch 1 has shape \[4, 2.*, expected \[n, 3"
    with pytest.raises(InputError, match=message):
        accumulate(lambda batch: model(*batch, parts=PARTS), loss, [one, fewer])
    with pytest.raises(InputError, match="batches is empty"):
        accumulate(model, loss, [])
    x = torch.ones(2, 3, requires_grad=True)
    for number, (first, second, message) in enumerate([
        ({"x": x}, {"y": x}, r"\['x'\] / \['y'\], expected equal names"),
        ({"x": x, "aux": x.sum()}, {"x": x, "aux": 2 * x.sum()}, "output aux is .*6.* and .*12"),
        ({"x": x, "grid": (2, 2)}, {"x": x, "grid": (2, 3)}, r"output grid is \(2, 2\) .* \(2, 3\)"),
        ({"x": x}, {"x": (2, 3)}, "output x of micro-batch 1 must be a tensor"),
    ]):  # fmt: skip
        with pytest.raises(InputError, match=message):
            accumulate(lambda output: output, lambda **outputs: outputs["x"].sum(), [first, second])
        assert x.grad is None, number


def two_ranks_with_two_micro_batches(rank: int, world_size: int) -> int:
    batch = scenes(12)
    model = cllip()
    value, wanted = plain(model, CllipLoss(), model(*batch, parts=PARTS))
    wrapped, syncs = DistributedDataParallel(model), []

    def count(state, bucket):  # DDP does not take annotations that are strings
        syncs.append(bucket.index())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    own = split(batch, 2, 4, 3, 3)[rank::world_size]  # ranks have micro-batches, and samples, of their own number
    for _ in range(2):  # buckets are rebuilt after the first
        model.zero_grad()
        syncs.clear()
        parts = accumulate(
            lambda batch: wrapped(*batch, parts=PARTS), CllipLoss(group=dist.group.WORLD), own, no_sync=wrapped.no_sync
        )
        torch.testing.assert_close(parts["loss"], value, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)
        assert sorted(syncs) == list(range(len(syncs)))  # each bucket once
    return len(syncs)


def test_two_ranks_equal_one_and_reduce_once() -> None:
    assert all(on_ranks(2, two_ranks_with_two_micro_batches))


def test_no_sync_holds_in_all_but_the_last_backward() -> None:
    model, inside, log = Towers().double(), [False], []

    @contextmanager
    def no_sync() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    model.logit_scale.register_hook(lambda gradient: log.append(("scale", inside[0])))
    model.image[0].weight.register_hook(lambda gradient: log.append(("weight", inside[0])))
    accumulate(model, ClipLoss(), split(pairs(12), 4, 4, 4), no_sync=no_sync)
    assert sorted(log) == [("scale", False), ("weight", False), ("weight", True), ("weight", True)]


# The trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    return make_scenes(root, train=40, val=1, unseen=1, processes=1) / "train"


def run(shards: Path, logs: Path, **options: object) -> list[dict]:
    """Train for 4 steps on 40 scenes; the lines of the log."""
    options = {"train_data": shards, "logs_dir": logs, "steps": 4, "warmup": 2, "log_every_n_steps": 1,
               "save_frequency": 3, "image_size": 32, "device": "cpu"} | options  # fmt: skip
    flags = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
    with distributed.start("cpu") as world:
        train(parse(flags), world)
    lines = [json.loads(line) for line in (logs / "scenes" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_in_micro_batches_follows_that_of_the_large_batch_and_resumes_exactly(
    shards: Path, tmp_path: Path
) -> None:
    large = run(shards, tmp_path / "large", batch_size=10)
    small = run(shards, tmp_path / "small", batch_size=5, accum_freq=2)
    for name in ("loss", "region_loss", "grad_norm", "logit_scale"):
        assert [line[name] for line in small] == pytest.approx([line[name] for line in large], rel=2e-4), name
    assert all(line["images_per_s"] * line["ms"] == pytest.approx(10_000) for line in small)
    last = tmp_path / "small" / "scenes" / "checkpoints" / "step_00000004.pt"
    unbroken = checkpoint.read(last)
    assert unbroken["loader"]["samples"] == 40
    last.unlink()
    resumed = run(shards, tmp_path / "small", batch_size=5, accum_freq=2, resume="latest")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in small]
    weights = checkpoint.read(last)["model"]
    assert all(torch.equal(weights[name], unbroken["model"][name]) for name in weights)


def test_a_step_of_more_samples_than_there_are_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds 40 samples, .*batch_size 10 × accum_freq 5"):
        run(shards, tmp_path, batch_size=10, accum_freq=5)
