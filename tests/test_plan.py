"""`cllip-fast plan`: its formulas against what PyTorch saves, counts and holds."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cllip_fast import cli
from cllip_fast.errors import InputError
from cllip_fast.kernels.block import TILE_ELEMENTS
from cllip_fast.models import PRESETS, CllipModel, create_model, set_execution
from cllip_fast.plan import DEVICES, Settings, largest_batch, loss_memory, predict_memory, predict_time
from cllip_fast.plan.layers import model_costs, regions, tower
from cllip_fast.plan.memory import optimizer_bytes
from cllip_fast.streaming.plan import CHUNK_COLUMNS, KEEP_BYTES
from cllip_fast.train.config import Config
from cllip_fast.train.optimizer import create_optimizer

CLIP = ("clip",)
LOCAL = ("clip", "region", "grounding", "patch")
TINY = Settings("tiny", 4, precision="fp32", losses=LOCAL)
TI16 = Settings("ViT-Ti-16", 2, precision="fp32", losses=LOCAL, max_regions=2, image_size=112, text_length=16)


def make(run: Settings) -> tuple[CllipModel, tuple[Tensor, ...]]:
    """The real model, and a batch in which no text is padded or repeated."""
    given = {"image_size": run.image_size or None, "attention": run.attention or None}
    model = create_model(run.model, text_length=run.text_length, region=run.region, **given)
    model.freeze_unused(run.parts)
    batch, config = run.batch_size, model.config
    images = torch.randn(batch, 3, config.image_size, config.image_size)
    text = torch.randint(1, config.vocab_size, (batch, run.text_length))
    if not run.parts:
        return model, (images, text)
    low = torch.rand(batch, run.max_regions, 2) / 2
    region_text = torch.randint(1, config.vocab_size, (batch, run.max_regions, run.region_length))
    return model, (images, text, torch.cat([low, low + 0.3], -1), region_text)


def saved_bytes(run: Settings, model: CllipModel, batch: tuple[Tensor, ...]) -> int:
    """Bytes of the different storages that autograd saves in the model's forward, parameters apart."""
    return saved_by(run, lambda: model(*batch, parts=run.parts), list(model.parameters()))


def saved_by(run: Settings, forward: Callable[[], object], apart: list[Tensor]) -> int:
    """Bytes of the different storages that autograd saves in `forward`, those of `apart` not counted."""
    counted = {tensor.untyped_storage().data_ptr() for tensor in apart}
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps addresses from being used again

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    autocast = torch.autocast("cpu", torch.bfloat16) if run.precision == "amp_bf16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), autocast:
        output = forward()
    del output
    return sum(storage.nbytes() for address, storage in storages.items() if address not in counted)


def predicted_bytes(run: Settings) -> int:
    copies = predict_memory(run).lines.get("weights, bf16 copies", 0)
    return sum(cost.kept for cost in model_costs(run).values()) + copies


@pytest.mark.parametrize("base", [TINY, TI16], ids=["tiny", "ViT-Ti-16"])
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize(
    "options",
    [{}, {"losses": CLIP}, {"losses": ("clip", "region"), "region": "roi_align"}, {"precision": "amp_bf16"}],
    ids=["local", "clip", "roi_align", "bf16"],
)
def test_activations_are_what_autograd_saves(base: Settings, attention: str, options: dict) -> None:
    run = replace(base, attention=attention, **options)
    predicted, measured = predicted_bytes(run), saved_bytes(run, *make(run))
    if attention == "matmul" and run.precision == "amp_bf16":
        # A CPU's autocast leaves an unmasked softmax in bf16: no fp32 scores, as a GPU has them.
        config, tokens = run.config, run.config.patch_grid[0] ** 2 + run.config.class_token
        unmasked = config.vision_depth * run.batch_size * config.vision_heads * tokens**2
        if config.causal_text:
            lengths = (run.batch_size * run.text_length**2, run.regions * run.region_length**2)
            unmasked += config.text_depth * config.text_heads * sum(lengths)
        predicted -= 4 * unmasked
    assert predicted == pytest.approx(measured, rel=0.01)


class Made(TorchDispatchMode):
    """The storages that operations make, by weak reference: what lives on after forward is what backward keeps.

    Hooks on saved tensors do not see what selective checkpointing puts aside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.bytes[StorageWeakRef(each.untyped_storage())] = each.untyped_storage().nbytes()
        return result

    def alive(self, apart: list[Tensor]) -> int:
        """Bytes that still exist, of storages other than those of `apart`."""
        gc.collect()
        known = {tensor.untyped_storage()._cdata for tensor in apart}
        return sum({made.cdata: size for made, size in self.bytes.items() if not made.expired()
                    and made.cdata not in known}.values())  # fmt: skip


def kept_bytes(run: Settings, model: CllipModel, batch: tuple[Tensor, ...]) -> int:
    autocast = torch.autocast("cpu", torch.bfloat16) if run.precision == "amp_bf16" else nullcontext()
    with Made() as made, autocast:
        output = model(*batch, parts=run.parts)
    graph = [value.grad_fn for value in output.values() if isinstance(value, Tensor)]
    del output
    size = made.alive(list(model.parameters()))
    del graph
    return size


@pytest.mark.parametrize("base", [TINY, TI16], ids=["tiny", "ViT-Ti-16"])
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_checkpointed_blocks_keep_what_is_predicted(base: Settings, attention: str, precision: str) -> None:
    sizes = {}
    for mode in ("blocks", "selective", "none"):
        run = replace(base, attention=attention, precision=precision, grad_checkpointing=mode)
        model, batch = make(run)
        set_execution(model, grad_checkpointing=mode)
        sizes[mode] = kept_bytes(run, model, batch)
        # Scores of a CPU's autocast: see test_activations_are_what_autograd_saves.
        if mode != "none" or (attention, precision) != ("matmul", "amp_bf16"):
            assert predicted_bytes(run) == pytest.approx(sizes[mode], rel=0.005), mode
        if mode == "blocks":
            assert saved_bytes(run, model, batch) == pytest.approx(sizes[mode], rel=0.001)
    assert sizes["blocks"] < sizes["selective"] < sizes["none"]


def test_a_checkpointed_layer_works_with_all_that_it_would_have_kept() -> None:
    costs = {mode: model_costs(replace(TI16, grad_checkpointing=mode)) for mode in ("none", "selective", "blocks")}
    images, depth = TI16.batch_size, TI16.config.vision_depth
    whole, some, least = (costs[mode]["vision tower"] for mode in costs)
    blocks = tower(TI16, images, 50, TI16.config.vision_width, TI16.config.vision_heads, depth)
    assert whole.forward == some.forward == least.forward
    assert whole.backward == some.backward  # on sdpa no product is made twice
    last = images * 50 * 4 * TI16.config.vision_width**2
    assert least.backward == whole.backward + blocks.forward - depth * last
    for fewer in (some, least):
        assert fewer.working == whole.working + (whole.kept - fewer.kept) / depth


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_quick_gelu_keeps_its_sigmoid(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    monkeypatch.setitem(PRESETS, "quick", replace(PRESETS["ViT-Ti-16"], name="quick", quick_gelu=True))
    run = replace(TI16, model="quick", attention=attention)
    assert predicted_bytes(run) == pytest.approx(saved_bytes(run, *make(run)), rel=0.001)


@pytest.mark.parametrize("base", [TINY, TI16], ids=["tiny", "ViT-Ti-16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"losses": CLIP},
        {"losses": ("region",), "region": "roi_align"},
        {"grad_checkpointing": "blocks"},
        {"grad_checkpointing": "blocks", "attention": "matmul"},
        {"grad_checkpointing": "selective", "attention": "matmul"},
    ],
    ids=["local", "clip", "roi_align", "blocks", "blocks, matmul", "selective, matmul"],
)
def test_products_are_what_the_flop_counter_counts(base: Settings, options: dict) -> None:
    run = replace(base, **options)
    model, batch = make(run)
    set_execution(model, grad_checkpointing=run.grad_checkpointing)
    costs = model_costs(run).values()
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        with FlopCounterMode(display=False) as forward:
            output = model(*batch, parts=run.parts)
        assert 2 * sum(cost.forward for cost in costs) == pytest.approx(forward.get_total_flops(), rel=0.01)
        with FlopCounterMode(display=False) as backward:
            sum(
                value.sum() for value in output.values() if isinstance(value, Tensor) and value.requires_grad
            ).backward()
    assert 2 * sum(cost.backward for cost in costs) == pytest.approx(backward.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("base", [TINY, TI16], ids=["pool=prompt", "pool=all"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("count", [1, 7])
def test_the_prompter_alone_is_exact(base: Settings, precision: str, count: int) -> None:
    """By itself, where a mistake does not drown among the towers: bytes, and products of both passes."""
    run = replace(base, precision=precision, max_regions=count, losses=("region", "grounding"))
    model, (images, _, boxes, _) = make(run)
    prompter, config = model.prompter, run.config
    tokens = model.image_tokens(images).detach().requires_grad_()
    texts = F.normalize(torch.randn(run.batch_size, count, config.embed_dim), dim=-1).requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        memory = prompter.remember(tokens)
        return F.normalize(prompter.region_features(memory, boxes), dim=-1), prompter.predict_boxes(memory, texts)

    cost, predicted = regions(run), regions(run).kept
    measured = saved_by(run, forward, [*prompter.parameters(), tokens, texts])
    if precision == "amp_bf16":
        predicted += 2 * sum(module.weight.numel() for module in prompter.modules() if isinstance(module, nn.Linear))
        # A CPU's autocast leaves in bf16 the prompts' softmax, the features' length and, alone, a text's norms.
        own, image = 2 + 1, tokens.shape[1]
        alone = config.vision_width * (config.prompter_pool == "prompt")
        predicted -= run.regions * 4 * (2 * 2 + 1 + own * image + 1 + alone)
    assert predicted == measured
    with FlopCounterMode(display=False) as products:
        outputs = forward()
    assert 2 * cost.forward == products.get_total_flops()
    with FlopCounterMode(display=False) as products:
        sum(output.sum() for output in outputs).backward()
    assert 2 * cost.backward == products.get_total_flops()


@pytest.mark.parametrize(("losses", "opt"), [(CLIP, "adamw"), (LOCAL, "adamw"), (CLIP, "muon"), (LOCAL, "muon")])
def test_parameters_gradients_and_optimizer_state_are_exact(losses: tuple[str, ...], opt: str) -> None:
    run = replace(TINY, losses=losses, gpus=2, opt=opt)
    model, batch = make(run)
    optimizer = create_optimizer(model, Config(opt=opt))
    output = model(*batch, parts=run.parts)
    sum(value.sum() for value in output.values() if isinstance(value, Tensor) and value.requires_grad).backward()
    optimizer.step()

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    lines = predict_memory(run).lines
    assert lines["weights, fp32"] == size(list(model.parameters()))
    gradients = size([each.grad for each in model.parameters() if each.grad is not None])
    assert lines["gradients"] == lines["DDP buckets"] == gradients
    state = [value for values in optimizer.state.values() for value in values.values()]
    name = "optimizer (AdamW)" if opt == "adamw" else "optimizer (Muon, AdamW)"
    assert lines[name] == optimizer_bytes(run) == size(state)


def test_loss_memory_is_linear_in_rows_and_gathers_what_is_kept() -> None:
    tiles, sums, gradients = 3 * 4 * TILE_ELEMENTS, 4 * 4 * 2 * 2048, 2 * 4 * 2048 * 512
    assert loss_memory(2048, 512, 1, 4) == tiles + sums + gradients
    assert loss_memory(2048, 512, 8, 2) == tiles + 4 * 4 * 9 * 2048 + gradients + 2 * 8 * 2048 * 512
    rows = KEEP_BYTES // (8 * 512 * 4)  # the last size that is kept; the next is gathered twice, chunk by chunk
    kept, again = loss_memory(rows, 512, 8, 4), loss_memory(2 * rows, 512, 8, 4)
    assert again - kept == (4 * 4 * 9 + 2 * 4 * 512) * rows + 2 * 4 * CHUNK_COLUMNS * 512 - KEEP_BYTES
    with pytest.raises(InputError, match="world_size is 0"):
        loss_memory(8, 8, 0, 4)


def test_the_largest_batch_fits_and_one_more_image_does_not() -> None:
    run, device = Settings("ViT-L-14", 1, gpus=8, text_length=77), DEVICES["h100"]
    largest = largest_batch(run, device)
    assert predict_memory(run.with_batch(largest)).peak <= device.memory
    assert predict_memory(run.with_batch(largest + 1)).peak > device.memory
    fewer = replace(run, grad_checkpointing="blocks")
    assert largest_batch(fewer, device) > 2 * largest
    assert largest_batch(Settings("ViT-H-14", 1, image_size=14 * 512, losses=CLIP), device) == 0


def test_time_takes_the_slower_of_products_and_bytes_and_hides_what_runs_beside() -> None:
    device = DEVICES["h100"]
    one, many = (predict_time(Settings("ViT-B-16", 256, gpus=gpus), device) for gpus in (1, 64))
    by_name = {work.name: work for work in one.work}
    vision, optimizer = by_name["vision tower"], by_name["optimizer"]
    assert vision.seconds == vision.product_seconds == vision.flops / 989e12 > vision.memory_seconds
    assert optimizer.seconds == optimizer.memory_seconds == 40 * Settings("ViT-B-16", 1).parameters().trained / 3.35e12
    assert one.transfers == ()
    assert one.seconds == pytest.approx(sum(work.seconds for work in one.work))
    texts, gradients = many.transfers
    losses = next(work for work in many.work if work.name == "losses")
    assert texts.exposed == pytest.approx(texts.seconds - losses.seconds)
    assert gradients.exposed == 0 < gradients.seconds
    assert many.seconds == pytest.approx(sum(work.seconds for work in many.work) + texts.exposed)
    twice = predict_time(Settings("ViT-B-16", 256, accum_freq=2), device)
    # Two batches, each forward once more: 2 · (3 + 1) / 3 of the products.
    assert twice.work[0].flops / vision.flops == pytest.approx(8 / 3, rel=0.02)
    assert twice.work[-2].flops == pytest.approx(4 * by_name["losses"].flops, rel=0.05)


def test_the_command_prints_a_table_and_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "ViT-L-14", "--batch-size", "128", "--gpus", "8", "--device", "h200"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    memory, step = figures["memory"], figures["time"]
    assert memory["peak"] == sum(memory["parts"].values())
    for name, size in memory["parts"].items():
        line = next(line for line in table.splitlines() if line.startswith(f"  {name} "))
        assert float(line.split()[-1]) == pytest.approx(size / 2**30, abs=0.006)
    assert f"{memory['peak'] / 2**30:.2f}  of 141 GiB: fits" in table
    assert f"largest batch that fits: {figures['largest_batch_size']}" in table
    assert f"at most {step['images_per_second']:.0f} images/s" in table
    assert figures["settings"]["precision"] == "amp_bf16"
    assert all(sentence in table for sentence in figures["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-X"], "--model is 'ViT-X', expected one of tiny"),
        (["--device", "tpu"], "--device is 'tpu', expected one of a100"),
        (["--image-size", "99"], "image_size is 99, expected a multiple of patch_size 8"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--losses", "clip,foo"], "--losses is 'foo', expected one of clip"),
        (["--grad-checkpointing", "all"], "--grad-checkpointing is 'all', expected one of none, selective, blocks"),
        (["--opt", "sgd"], "--opt is 'sgd', expected one of adamw, apex-adam, apex-lamb, muon"),
        (["--region-length", "40"], "--region-length is 40, expected at most --text-length 32"),
        (["--region", "roi_align"], "needs --region prompter"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
