"""A whole training step on this machine: ours against OpenCLIP's model, loss and optimizer, and the share of each part.

    pytest benchmarks/test_train_step.py --benchmark-only --benchmark-json .benchmarks/train_step.json
    python -m benchmarks.step_report .benchmarks/train_step.json                # the table, in benchmarks/results/
    CLLIP_BENCH_SHRINK=8 pytest benchmarks/test_train_step.py --benchmark-only  # a trial, batches divided by 8

Both start from the same random weights and see the same images and texts, none of them padded. Before anything is timed
the number of parameters, the operations of the model and the first loss have to agree. The optimizer is each trainer's
own AdamW, gradients are clipped in both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conftest import Peers
from benchmarks.peers import shrunk
from cllip_fast.data import Batch, create_loader, train_bpe
from cllip_fast.interchange import load_pretrained
from cllip_fast.losses import CllipLoss
from cllip_fast.models import CllipModel, create_model
from cllip_fast.train.config import LOSSES, Config
from cllip_fast.train.main import forward
from cllip_fast.train.optimizer import create_optimizer
from tests.data.painted import record, write_shard
from tests.data.photos import encoded, photo
from tests.openclip_peer import openclip_losses, openclip_model

LENGTH, REGION_LENGTH, REGIONS = 77, 8, 4
BATCHES = {"ViT-Ti-16": 32, "ViT-B-32": 16}
ROUNDS = shrunk(7)


@dataclass
class Step:
    """One trainer's step on a fixed batch; `seconds` collects what its parts took, of all calls together."""

    model: nn.Module
    encode: Callable[[], dict[str, Tensor]]
    loss: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    clamp: Callable[[], object]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def __call__(self) -> Tensor:
        with self.timed("forward"):
            outputs = self.encode()
        with self.timed("losses"):
            value = self.loss(**outputs)
        with self.timed("backward"):
            value.backward()
        with self.timed("optimizer"):
            nn.utils.clip_grad_norm_([each for each in self.model.parameters() if each.requires_grad], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.clamp()
        return value.detach()

    def watch(self, module: nn.Module, part: str) -> None:
        """Time a module's forward calls as a part of their own."""
        running = []

        def begin(*_: object) -> None:
            running.append(self.timed(part))
            running[-1].__enter__()

        def end(*_: object) -> None:
            running.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def shares(self) -> dict[str, float]:
        """Milliseconds of each part, summed over all calls; what the towers leave of forward is Prompter and heads."""
        parts = dict(self.seconds)
        towers = {name: parts.pop(name, 0.0) for name in ("vision tower", "text tower")}
        rest = parts.pop("forward") - sum(towers.values())
        return {name: 1e3 * seconds for name, seconds in (towers | {"prompter, heads": rest} | parts).items()}


def make_batch(size: int, count: int, vocabulary: int) -> Batch:
    """Random images and texts; each text fills its columns and ends in the highest token, where both models read it."""
    generator = torch.Generator().manual_seed(0)

    def texts(*shape: int) -> Tensor:
        ids = torch.randint(1, vocabulary - 1, shape, generator=generator)
        ids[..., -1] = vocabulary - 1
        return ids

    low = torch.rand(count, REGIONS, 2, generator=generator) / 2
    return Batch(
        images=torch.randn(count, 3, size, size, generator=generator),
        text=texts(count, LENGTH),
        boxes=torch.cat([low, low + 0.4], -1),
        region_text=texts(count, REGIONS, REGION_LENGTH),
        region_mask=torch.ones(count, REGIONS, dtype=torch.bool),
        keys=[str(number) for number in range(count)],
        captions=[[]] * count,
        phrases=[[]] * count,
    )


def openclip_step(model: CllipModel, batch: Batch) -> Step:
    """OpenCLIP's model of the same sizes, its loss, and AdamW as its trainer makes it."""
    config = model.config
    vision = {"layers": config.vision_depth, "width": config.vision_width, "patch_size": config.patch_size,
              "head_width": config.vision_width // config.vision_heads, "image_size": config.image_size}  # fmt: skip
    text = {"context_length": LENGTH, "vocab_size": config.vocab_size, "width": config.text_width,
            "heads": config.text_heads, "layers": config.text_depth}  # fmt: skip
    peer = openclip_model().CLIP(config.embed_dim, vision, text, output_dict=True)
    plain = [each for name, each in peer.named_parameters() if each.ndim < 2 or "logit_scale" in name]
    decayed = [each for name, each in peer.named_parameters() if not (each.ndim < 2 or "logit_scale" in name)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": Config.wd}]
    optimizer = torch.optim.AdamW(groups, lr=Config.lr, betas=(Config.beta1, Config.beta2), eps=Config.eps)

    def clamp() -> None:
        with torch.no_grad():
            peer.logit_scale.clamp_(0, 4.6052)

    step = Step(peer, partial(peer, batch.images, batch.text), openclip_losses().ClipLoss(), optimizer, clamp)
    step.watch(peer.visual, "vision tower")
    step.watch(peer.transformer, "text tower")  # its embedding and projection count as heads
    return step


def our_step(name: str, losses: tuple[str, ...], batch: Batch) -> Step:
    """Ours, as `train/main.py` puts it together."""
    model = create_model(name, text_length=LENGTH)
    config = Config(model=name, losses=",".join(losses))
    parts = tuple({"localization": "patch"}.get(loss, loss) for loss in losses if loss != "clip")
    model.freeze_unused(parts)
    loss = CllipLoss(losses, filter_threshold=None, grounding=config.grounding)
    step = Step(model, partial(forward, model, batch, parts), loss, create_optimizer(model, config),
                model.clamp_logit_scales)  # fmt: skip
    step.watch(model.visual, "vision tower")
    step.watch(model.text, "text tower")
    return step


def work(step: Step) -> tuple[int, int]:
    """Parameters that are trained, and floating-point operations of the model, forward and backward."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        outputs = step.encode()
        sum(outputs[name].sum() for name in ("image_features", "text_features")).backward()
    step.optimizer.zero_grad()
    return sum(each.numel() for each in step.model.parameters() if each.requires_grad), counter.get_total_flops()


def data_seconds(folder: Path, count: int, size: int) -> float:
    """The time of a batch from the plain loader in this process: photographs of 500 × 375 pixels, four regions each."""
    regions = [{"box": [40, 40, 300, 300], "text": "a part"}] * REGIONS
    pictures = [encoded(photo(500, 375, seed)) for seed in range(4)]
    write_shard(folder, [(f"p{i}", pictures[i % 4], record(500, 375, regions=regions)) for i in range(count)])
    loader = create_loader(
        folder, tokenizer=train_bpe(["a part"], 260), batch_size=count,
        image_size=size, text_length=LENGTH, region_length=REGION_LENGTH, max_regions=REGIONS, train=True,
    )  # fmt: skip
    stream, times = loader.forever(), []
    for _ in range(4):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@pytest.mark.parametrize("losses", [("clip",), LOSSES], ids=["clip", "all"])
@pytest.mark.parametrize("name", BATCHES)
def test_train_step(benchmark: Callable, tmp_path: Path, name: str, losses: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    count = shrunk(BATCHES[name])
    sizes = create_model(name, text_length=LENGTH).config
    batch = make_batch(sizes.image_size, count, sizes.vocab_size)
    ours = our_step(name, losses, batch)
    theirs = openclip_step(ours.model, batch)
    torch.save(theirs.model.state_dict(), tmp_path / "weights.pt")
    load_pretrained(ours.model, str(tmp_path / "weights.pt"))
    if losses == ("clip",):  # the others have no peer: their ratio to OpenCLIP's CLIP step tells what regions cost
        assert work(ours) == work(theirs)
    first = CllipLoss(("clip",))(**forward(ours.model, batch, ()))
    torch.testing.assert_close(first, theirs.loss(**theirs.encode()), rtol=1e-4, atol=1e-4)
    del first

    for step in (ours, theirs):
        step()  # a warm-up: the optimizer's state is made
        step.seconds.clear()
    timed = Peers({"open_clip": theirs})
    benchmark.pedantic(ours, setup=timed.before, teardown=timed.after, rounds=ROUNDS)
    peer = timed.seconds["open_clip"]
    benchmark.extra_info.update(
        train_step={"model": name, "losses": losses, "batch": count, "image_size": sizes.image_size, "text": LENGTH},
        parts={"data": 1e3 * data_seconds(tmp_path / "shards", count, sizes.image_size)}
        | {part: milliseconds / ROUNDS for part, milliseconds in ours.shares().items()},
        peer={"median": statistics.median(peer), "min": min(peer), "rounds": len(peer),
              "parts": {part: milliseconds / len(peer) for part, milliseconds in theirs.shares().items()}},
    )  # fmt: skip
