"""Train a CLLIP model: image-text, region-text, grounding, patch-text and localization losses in one loop.

    torchrun --standalone train/main.py                                        # generated scenes, minutes on a CPU
    torchrun --standalone train/main.py --losses clip --region roi_align       # plain CLIP on the same scenes
    torchrun --standalone --nproc-per-node 2 train/main.py --batch-size 32     # the same batches on two processes
    torchrun --standalone train/main.py --batch-size 16 --accum-freq 4         # the same step in less memory
    torchrun --standalone --nproc-per-node 8 train/main.py --config train/recipes/vit_b16.toml --train-data shards/
    torchrun --standalone train/main.py --config train/recipes/finetune_clip.toml ...   # from CLIP weights
    torchrun --nnodes 8 --nproc-per-node 8 ... train/main.py --parallel fsdp   # sharded (train/recipes/slurm.sh)
    torchrun --standalone train/main.py --resume latest                        # go on after an interruption

Writes runs/<name>/: config.json, log.jsonl, checkpoints/, results.json, curves.png, sheet_<split>.png.
SIGTERM, SIGUSR1 or Ctrl-C, to any rank, saves a checkpoint and ends with exit code 75: go on with --resume latest.
0: done, 1: an error. torchrun makes 1 of every code but 0; runs/<name>/stopped tells such an end from an error.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from cllip_fast import __version__, extras
from cllip_fast.data import Batch
from cllip_fast.errors import InputError
from cllip_fast.interchange import load_pretrained
from cllip_fast.kernels import native
from cllip_fast.losses import CllipLoss
from cllip_fast.models import CllipModel, create_model, set_execution
from cllip_fast.train import checkpoint, distributed, parallel
from cllip_fast.train.accumulate import accumulate
from cllip_fast.train.config import Config, parse
from cllip_fast.train.evaluation import Evaluation
from cllip_fast.train.inputs import create_inputs
from cllip_fast.train.logs import create_log
from cllip_fast.train.optimizer import create_optimizer, freeze_towers, learning_rate, set_learning_rate, step_unless
from cllip_fast.train.precision import Precision
from cllip_fast.train.profiling import StepProfiler
from cllip_fast.train.signals import UNFINISHED, StopRequest
from cllip_fast.train.skipped import SkippedSteps


def build_model(config: Config, vocab_size: int) -> CllipModel:
    torch.manual_seed(config.seed)
    model = create_model(
        config.model,
        image_size=config.image_size or None,
        vocab_size=vocab_size,
        text_length=config.text_length,
        region=config.region,
        attention=config.attention or None,
        norm=config.norm,
        **({"prompter_pool": config.prompter_pool} if config.prompter_pool else {}),
    )
    set_execution(
        model,
        grad_checkpointing=config.grad_checkpointing,
        text_packing=config.text_packing,
        compile=config.compile,
    )
    return model


def build_loss(config: Config, world: distributed.World) -> CllipLoss:
    return CllipLoss(
        config.parts,
        local_weight=config.local_weight,
        patch_weight=config.patch_weight,
        localization_weight=config.localization_weight,
        filter_threshold=config.filter_threshold or None,
        pool=config.patch_pool,
        grounding=config.grounding,
        group=world.group,
    )


def forward(model: nn.Module, batch: Batch, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """What the losses need of a batch; regions are not even read when no loss asks for them."""
    regions = (batch.boxes, batch.region_text, batch.region_mask) if parts else ()
    return model(batch.images, batch.text, *regions, parts=parts)


def train(config: Config, world: distributed.World) -> bool:
    """Train, evaluate, draw; False if a signal ended it before."""
    began, run = time.perf_counter(), Path(config.logs_dir) / config.name
    stop = StopRequest(world.patient)
    if world.is_main:
        kind = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
        print(f"CLLIP-Fast {__version__}, torch {torch.__version__}, {world.size} x {kind}")
        print(f"  {'extras':<13} {extras.report()}\n  {'kernels':<13} {native.describe()}")
        print(config.describe(), flush=True)

    inputs = create_inputs(config, world)
    source = world.from_main(lambda: checkpoint.find(config.resume, run / "checkpoints"))
    model = build_model(config, inputs.tokenizer.vocab_size)
    pretrained = load_pretrained(model, config.pretrained) if config.pretrained and not source else ""
    precision = Precision(config.precision, world.device)
    model = parallel.shard(model.to(world.device), config, world, precision.dtype)
    model_parts = tuple({"localization": "patch"}.get(part, part) for part in config.parts if part != "clip")
    model.freeze_unused(model_parts)
    loss = build_loss(config, world)
    optimizer = create_optimizer(model, config)
    checkpoints = checkpoint.Checkpoints(
        run / "checkpoints", config, model, optimizer, inputs.train, world.is_main, precision.scaler
    )
    step, earlier = 0, None
    if source:
        step = checkpoints.restore(source)
    elif world.is_main:
        earlier = checkpoint.set_aside(run)
    if world.is_main:
        checkpoints.prepare()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = freeze_towers(model) if step < config.freeze_steps else []
    wrapped = parallel.wrap(model, world)

    log = create_log(run, config, step, world)
    skipped = SkippedSteps(run / "skipped.jsonl", config.max_skipped, step, model, world, log.say)
    profiler = StepProfiler(config.profiled if world.is_main else range(0), run, step, log.say)
    evaluation = Evaluation(model, inputs, config, world, log, run, stop)
    log.say(f"  {'model':<13} {model.describe()}\n  {'precision':<13} {precision.describe()}")
    log.say(f"  {'work':<13} {log.speed.description}")
    log.say(f"  {'input':<13} {inputs.describe()}")
    if pretrained:
        log.say(f"  {'start':<13} {pretrained}")
    if earlier:
        log.say(f"an earlier run of this name is now {earlier}")
    log.say(f"going on after step {step} of {source}" if source else f"writing to {run}")
    if world.is_main:
        with checkpoint.writable(run):
            (run / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
            inputs.tokenizer.save(run / f"tokenizer{inputs.tokenizer.suffix}")
            (run / "stopped").unlink(missing_ok=True)

    def encode(batch: Batch) -> dict[str, Tensor]:
        with precision.autocast:
            return forward(wrapped, batch.to(world.device, non_blocking=True), model_parts)

    def contrast(**features: Tensor) -> dict[str, Tensor]:
        with precision.autocast:  # on a GPU the losses multiply in its type; they accumulate in fp32 by themselves
            return loss(**features, output_dict=True)

    stream = inputs.train.forever()
    profiler.start(model, loss, optimizer)
    log.start_clock()
    while step < config.steps:
        waiting = time.perf_counter()
        with record_function("data"):
            batches = [next(stream) for _ in range(config.accum_freq)]
        data_seconds = time.perf_counter() - waiting
        if frozen and step == config.freeze_steps:
            for parameter in frozen:
                parameter.requires_grad_(True)
            frozen, wrapped = [], parallel.wrap(model, world)
            log.say(f"the towers are thawed after step {step}")
        set_learning_rate(optimizer, step, config)
        # Forward, loss, backward: of one large batch, however many micro-batches it comes in.
        no_sync = partial(parallel.no_sync, wrapped)
        scaler = precision.scaler  # without fp16, what it is asked for below does nothing
        parts = accumulate(encode, contrast, batches, no_sync=no_sync, scale=scaler.scale)
        total = sum(parts.values())
        scaler.unscale_(optimizer)
        grad_norm = parallel.clip_grad_norm_(trained, config.grad_clip_norm)
        found_inf = (~(torch.isfinite(total) & torch.isfinite(grad_norm))).float()
        step_unless(found_inf, optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.clamp_logit_scales()
        step += 1
        log.add(loss=total, **parts, grad_norm=grad_norm, skipped=found_inf, data_seconds=data_seconds)
        skipped.add(step, batches, parts, found_inf)
        profiler.step()

        # Reading figures waits for the GPU: once an interval, not every step.
        stopping, at_end = stop.agreed(), step == config.steps
        interval = at_end or step % config.log_every_n_steps == 0
        saving = at_end or stopping or step % config.save_frequency == 0
        if interval:
            world.roll_call()
            log.flush(
                step,
                config.batch_size * config.accum_freq * world.size,
                lr=learning_rate(step - 1, config),
                logit_scale=model.logit_scale.exp().item(),
                region_logit_scale=model.local_logit_scale.exp().item(),
                **precision.figures(),
                **inputs.train.counts,
            )
        if interval or saving:
            skipped.check()
        checkpoints.poll()
        if saving:
            try:
                with log.paused():
                    checkpoints.save(step, wait=stopping or at_end)
            except InputError as error:  # the earlier ones are whole; only the save that ends a run must succeed
                if stopping or at_end:
                    raise
                log.say(f"warning: {error}; the run goes on")
        if stopping and not at_end:
            log.say(f"stopped by {stop.signal or 'another rank'} after step {step}; --resume latest goes on")
            break
        if config.eval_frequency and step % config.eval_frequency == 0 and not at_end:
            with log.paused():
                evaluation.evaluate(step)
    done = step == config.steps and evaluation.finish(step, time.perf_counter() - began)
    if world.is_main and not done:
        with checkpoint.writable(run):
            (run / "stopped").write_text(f"{stop.signal or 'a signal to another rank'}, step {step}\n")
    profiler.close()
    log.close()
    return done


def main() -> int:
    config = parse(description=__doc__)
    with distributed.start(config.device, config.timeout) as world:
        return 0 if train(config, world) else UNFINISHED


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
