"""OpenCLIP's own training loop and `create_loss`: with our losses, the same curve and the same weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.openclip_peer import openclip_trainer
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("open_clip_train") is None, reason="open_clip_torch is not installed"
)

BATCH, BATCHES, SIZE, WORDS, VOCABULARY = 12, 4, 16, 6, 30
TEXT = {"context_length": WORDS, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1}
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": SIZE},
    "text_cfg": TEXT,
}
COCA = {
    "embed_dim": 16,
    "vision_cfg": TINY["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
    "custom_text": True,
}


class Case(NamedTuple):
    """OpenCLIP's command-line arguments, the number of ranks, the type of model and images."""

    flags: list[str]
    ranks: int = 1
    dtype: torch.dtype = torch.float64


SIGLIP = ["--siglip", "--lr=0.005"]
FULL = ["--local-loss", "--gather-with-grad"]
CASES = {
    "clip": Case([]),
    "clip, fp32": Case([], dtype=torch.float32),
    "clip, accumulated": Case(["--accum-freq=2"]),
    "siglip": Case(SIGLIP),
    "siglip, accumulated": Case([*SIGLIP, "--accum-freq=2"]),
    "coca": Case(["--model=tiny_coca"]),
    "distill, gradients clipped": Case(["--distill-model=tiny", "--grad-clip-norm=0.5"]),
    "clip, 2 ranks": Case([], ranks=2),
    "clip, accumulated, full gradient, 2 ranks": Case([*FULL, "--accum-freq=2"], ranks=2),
    "siglip, 2 ranks": Case([*SIGLIP, "--loss-dist-impl=shift"], ranks=2),
    "distill, full gradient, 2 ranks": Case([*FULL, "--distill-model=tiny"], ranks=2),
}


class Batches:
    """What OpenCLIP's loop asks of a data loader: random images and captions, the same for every run."""

    num_batches, num_samples = BATCHES, BATCHES * BATCH

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rank)
        shape = (BATCHES, BATCH)
        self.images = torch.randn(*shape, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        self.texts = torch.randint(1, VOCABULARY, (*shape, WORDS), generator=generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.texts, strict=True)


class Curve(list):
    """The part of a TensorBoard writer that the loop uses; keeps the losses and the logit scale."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/scale" or name.endswith("loss"):
            self.append((name, step, value))


def arguments(case: Case, rank: int) -> Namespace:
    """The arguments as OpenCLIP's `main` prepares them."""
    flags = ["--model=tiny", "--device=cpu", "--precision=fp32", "--lr=0.05", f"--batch-size={BATCH}"]
    params = importlib.import_module("open_clip_train.params")
    args = params.parse_args([*flags, "--log-every-n-steps=1", *case.flags])
    args.rank, args.world_size, args.distributed = rank, case.ranks, case.ranks > 1
    args.distill, args.wandb = args.distill_model is not None, False
    return args


def train(losses: ModuleType, case: Case, rank: int) -> tuple[Curve, dict[str, Tensor]]:
    """Two epochs of `train_one_epoch` with the loss that `create_loss` makes of the classes in `losses`."""
    trainer, open_clip = openclip_trainer(), importlib.import_module("open_clip")
    args = arguments(case, rank)
    for name in ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"):
        setattr(open_clip.factory, name, getattr(losses, name))
    loss = open_clip.create_loss(args)
    assert type(loss).__module__.startswith(losses.__name__)

    extra = {"init_logit_scale": 2.3, "init_logit_bias": -10.0} if args.siglip else {}
    torch.manual_seed(1)
    teacher = open_clip.create_model("tiny", output_dict=True).to(case.dtype) if args.distill else None
    model = open_clip.create_model(args.model, output_dict=True, **extra).to(case.dtype)
    for weight in model.parameters():
        if weight.dim() > 1:  # OpenCLIP leaves one of CoCa's as the memory was
            nn.init.normal_(weight, std=0.2)
    if args.distributed:
        model = nn.parallel.DistributedDataParallel(model)
    # Not AdamW: its steps are the same whatever a gradient is multiplied by.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    steps = 2 * BATCHES // args.accum_freq
    scheduler = importlib.import_module("open_clip_train.scheduler").cosine_lr(optimizer, args.lr, 1, steps)
    data = {"train": Namespace(dataloader=Batches(rank, case.dtype), set_epoch=lambda epoch: None)}
    curve = Curve()
    for epoch in range(2):
        trainer.train_one_epoch(model, data, loss, epoch, optimizer, None, scheduler, teacher, args, curve)
    return curve, {name: value.detach() for name, value in model.named_parameters()}


def run_cases(rank: int, world_size: int) -> dict[str, list]:
    """{name: [(curve, weights) with OpenCLIP's losses, with ours]} of the cases for this number of ranks."""
    openclip_trainer()
    open_clip = importlib.import_module("open_clip")
    peer, ours = importlib.import_module("open_clip.loss"), importlib.import_module("cllip_fast.losses")
    # A batch this small would take the plain form; the operators are what is on trial.
    importlib.import_module("cllip_fast.streaming.small").PLAIN_ROWS["cpu"] = {"info_nce": 0, "sigmoid": 0}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in (("tiny", TINY), ("tiny_coca", COCA)):
            Path(folder, f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
    cases = {name: case for name, case in CASES.items() if case.ranks == world_size}
    return {name: [train(losses, case, rank) for losses in (peer, ours)] for name, case in cases.items()}


@pytest.fixture(scope="module")
def runs() -> dict[str, list]:
    """Rank 0's results of all cases."""
    return on_ranks(1, run_cases)[0] | on_ranks(2, run_cases)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_same_curve_and_weights(name: str, runs: dict[str, list]) -> None:
    (expected, expected_weights), (curve, weights) = runs[name]
    bounds = {"rtol": 1e-4, "atol": 1e-5} if CASES[name].dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    assert [point[:2] for point in curve] == [point[:2] for point in expected]
    torch.testing.assert_close([value for *_, value in curve], [value for *_, value in expected], **bounds)
    torch.testing.assert_close(weights, expected_weights, **bounds)
    total = [value for name, _, value in expected if name == "train/loss"]
    assert total[-1] < 0.9 * total[0], "nothing was learned: any two curves would agree"
