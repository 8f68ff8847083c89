"""The plan as a table, and as a dict for JSON."""

from __future__ import annotations

from dataclasses import asdict

from cllip_fast.plan.devices import GIB, NODE_GPUS, RESERVED, Device
from cllip_fast.plan.memory import Memory
from cllip_fast.plan.settings import Settings
from cllip_fast.plan.time import StepTime


def assumptions(run: Settings, device: Device) -> list[str]:
    """What the figures rest on, a sentence each."""
    where = "inside a node" if run.gpus <= NODE_GPUS else f"between nodes (more than {NODE_GPUS} GPUs)"
    said = [
        f"{device.name}, by its data sheet: {device.memory / GIB:.0f} GB (read as GiB), {device.bf16 / 1e12:.0f} "
        f"TFLOP/s in bf16 and {device.tf32 / 1e12:.0f} in TF32 (dense), {device.bandwidth / 1e12:.2f} TB/s",
        f"link {device.interconnect(run.gpus) / 1e9:.0f} GB/s a GPU and way, {where}",
        f"{RESERVED / GIB:.1f} GiB for driver, CUDA, NCCL and libraries; no fragmentation of the allocator",
        "gradients are counted beside all activations: an upper bound for the first batch of a step",
        "every caption and region text at its full length, every region real",
        "all products in bf16 under autocast, the losses' too; in TF32 in a run of fp32",
        "a floor, not a forecast: kernels reach a part of these peaks, and what norms, GELU and copies move "
        "beyond what backward needs is not counted",
    ]
    if run.grad_checkpointing != "none":
        what = "their input" if run.grad_checkpointing == "blocks" else "their input and their products' outputs"
        said.append(f"blocks of both towers and the Prompter's layer keep {what}; backward computes the rest again")
    if run.accum_freq > 1:
        said.append("accumulation as GradCache: all batches for their features, one loss, each again with a graph")
    return said


def as_dict(run: Settings, device: Device, memory: Memory, time: StepTime, largest: int) -> dict[str, object]:
    """Everything that the table shows, in bytes and seconds."""
    images = run.batch_size * run.accum_freq * run.gpus
    return {
        "settings": asdict(run),
        "device": asdict(device),
        "memory": {"parts": memory.lines, "peak": memory.peak, "fits": memory.peak <= device.memory},
        "largest_batch_size": largest,
        "time": {
            "parts": [asdict(work) | {"seconds": work.seconds} for work in time.work],
            "communication": [asdict(transfer) for transfer in time.transfers],
            "seconds": time.seconds,
            "images_per_second": images / time.seconds,
        },
        "assumptions": assumptions(run, device),
    }


def as_text(run: Settings, device: Device, memory: Memory, time: StepTime, largest: int) -> str:
    """The table that `cllip-fast plan` prints."""
    parameters, images = run.parameters(), run.batch_size * run.accum_freq * run.gpus
    batches = f" x {run.accum_freq} batches" if run.accum_freq > 1 else ""
    lines = [
        f"{run.model}, {run.config.image_size} px, {parameters.total / 1e6:.1f} M parameters "
        f"({parameters.trained / 1e6:.1f} M trained), {run.precision}, losses {','.join(run.losses)}",
        f"{run.gpus} x {device.name}, batch {run.batch_size} a GPU{batches}, {images} in all",
        "",
        f"{'memory of a GPU':<28}{'GiB':>10}",
        *(f"  {name:<26}{_gib(size):>10}" for name, size in memory.lines.items()),
        f"  {'peak':<26}{_gib(memory.peak):>10}  of {device.memory / GIB:.0f} GiB: "
        f"{'fits' if memory.peak <= device.memory else 'DOES NOT FIT'}",
        f"  largest batch that fits: {largest if largest else 'none'}",
        "",
        f"{'floor of a step':<28}{'TFLOP':>10}{'GB moved':>10}{'ms':>10}",
        *(
            f"  {work.name:<26}{work.flops / 1e12:>10.3f}{work.bytes / 1e9:>10.2f}{work.seconds * 1e3:>10.2f}"
            f"  {'products' if work.product_seconds >= work.memory_seconds else 'bytes'}"
            for work in time.work
        ),
        *(
            f"  {each.name:<26}{'':>10}{each.bytes / 1e9:>10.2f}{each.exposed * 1e3:>10.2f}"
            f"  not hidden, of {each.seconds * 1e3:.2f} behind {each.behind}"
            for each in time.transfers
        ),
        f"  {'step':<26}{'':>20}{time.seconds * 1e3:>10.2f}  at most {images / time.seconds:.0f} images/s",
        "",
        "assumed",
        *(f"  {sentence}" for sentence in assumptions(run, device)),
    ]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}" if size < GIB / 10 else f"{size / GIB:.2f}"
