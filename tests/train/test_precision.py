"""Precision: fp16's loss scale in accumulation, clipping, skipped steps and checkpoints; what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from cllip_fast.data import make_scenes
from cllip_fast.errors import InputError
from cllip_fast.losses import ClipLoss
from cllip_fast.train import checkpoint, distributed
from cllip_fast.train.accumulate import accumulate
from cllip_fast.train.config import Config, parse
from cllip_fast.train.main import train
from cllip_fast.train.precision import Precision
from tests.ranks import on_ranks

CPU = torch.device("cpu")


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(4, 5, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {
            "image_features": nn.functional.normalize(self.image(batch[0]), dim=-1),
            "text_features": nn.functional.normalize(self.text(batch[1]), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


@pytest.mark.parametrize("name", ["auto", "fp32", "amp_bf16", "amp_fp16"])
def test_products_are_in_the_type_and_weights_and_gradients_in_fp32(name: str) -> None:
    precision, layer = Precision(name, CPU), nn.Linear(4, 3)
    with precision.autocast:
        output = layer(torch.randn(2, 4))
    assert output.dtype == {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(name, torch.float32)
    precision.scaler.scale(output.float().sum()).backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
    assert precision.scaler.is_enabled() == (name == "amp_fp16") == bool(precision.figures())
    assert precision.describe().startswith("fp32" if name == "auto" else name)


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)])
def test_accumulated_gradients_are_multiplied_and_the_values_are_not(sizes: tuple[int, ...]) -> None:
    """By a power of two: not a bit changes."""
    batch = (torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64))
    batches = list(zip(*(each.split(list(sizes)) for each in batch), strict=True))
    plain, scaled, scaler = Towers(), Towers(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wanted = accumulate(plain, ClipLoss(), batches)
    assert accumulate(scaled, ClipLoss(), batches, scale=scaler.scale) == wanted
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(other.grad, 1024 * one.grad)
    scaler.unscale_(torch.optim.SGD(scaled.parameters(), lr=1.0))
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(other.grad, one.grad)


def sharded_overflow(rank: int, world_size: int) -> tuple[float, float]:
    """An overflow in the shard of one rank: unscaling tells all ranks, and so does the norm."""
    torch.manual_seed(0)
    model = nn.Linear(4, 8)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (world_size,)))
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    if rank == 1:
        model.weight.grad.to_local()[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
    scaler.update()
    return scaler.get_scale(), norm.item()


def test_ranks_agree_on_an_overflow_in_one_shard() -> None:
    for scale, norm in on_ranks(2, sharded_overflow):
        assert scale == 2.0**15
        assert not torch.isfinite(torch.tensor(norm))


# The trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    return make_scenes(root, train=24, val=1, unseen=1, processes=1) / "train"


def run(shards: Path, logs: Path, **options: object) -> list[dict]:
    options = {"train_data": shards, "logs_dir": logs, "steps": 3, "warmup": 0, "log_every_n_steps": 1,
               "batch_size": 8, "image_size": 32, "device": "cpu", "losses": "clip,region"} | options  # fmt: skip
    flags = []
    for name, value in options.items():
        flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    with distributed.start("cpu") as world:
        train(parse(flags), world)
    lines = [json.loads(line) for line in (logs / "scenes" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_fp16_follows_fp32_and_its_scale_is_in_the_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10, growth_interval=2))
    full = run(shards, tmp_path / "fp32")
    half = run(shards, tmp_path / "fp16", precision="amp_fp16", batch_size=4, accum_freq=2)
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=0.02)
    # The norm that is logged, and clipped, is that of unscaled gradients.
    assert [line["grad_norm"] for line in half] == pytest.approx([line["grad_norm"] for line in full], rel=0.05)
    assert [line["loss_scale"] for line in half] == [1024, 2048, 2048]
    saved = checkpoint.read(tmp_path / "fp16" / "scenes" / "checkpoints" / "step_00000003.pt")
    assert saved["scaler"]["scale"] == 2048
    assert saved["scaler"]["_growth_tracker"] == 1
    longer = {"precision": "amp_fp16", "batch_size": 4, "accum_freq": 2, "resume": "latest", "steps": 4}
    assert run(shards, tmp_path / "fp16", **longer)[-1]["loss_scale"] == 4096


def test_an_overflow_skips_the_step_and_halves_the_scale_and_the_run_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**120))
    lines = run(shards, tmp_path, precision="amp_fp16")
    assert [line["skipped"] for line in lines] == [1, 1, 1]
    assert [line["loss_scale"] for line in lines] == [2.0**119, 2.0**118, 2.0**117]
    saved = checkpoint.read(tmp_path / "scenes" / "checkpoints" / "step_00000003.pt")
    assert all(float(state["step"]) == 0 for state in saved["optimizer"]["state"].values())


@pytest.mark.slow
def test_a_run_with_every_option_follows_the_plain_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor's usual folder may hold what a killed process left half-written.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain = run(shards, tmp_path / "plain")
    other = run(shards, tmp_path / "other", grad_checkpointing="selective", text_packing=True, compile=True)
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in plain], rel=1e-4)


def test_fp8_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"--precision is 'fp8', which is not implemented.*expected amp_bf16"):
        Config(precision="fp8")
    with pytest.raises(InputError, match="--precision is 'int4', expected one of auto, fp32, amp_bf16, amp_fp16, fp8"):
        Config(precision="int4")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"opt": "sgd"}, "--opt is 'sgd', expected one of adamw, apex-adam, apex-lamb, muon"),
        ({"norm": "rms"}, "--norm is 'rms', expected one of torch, apex"),
        ({"grad_checkpointing": "all"}, "--grad-checkpointing is 'all', expected one of none, selective, blocks"),
        ({"attention": "fa5"}, "--attention is 'fa5', expected one of , sdpa, matmul, flash, fa3, fa4, xformers"),
    ],
)
def test_unknown_names_are_refused(option: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**option)
