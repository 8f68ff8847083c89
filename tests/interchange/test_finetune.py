"""Training from weights: rates by layer, towers that start frozen, and a whole run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from cllip_fast.data import load_tokenizer, make_scenes, read_dataset_info
from cllip_fast.errors import InputError
from cllip_fast.models import create_model, layers_above
from cllip_fast.models.cllip import TOWERS
from cllip_fast.train import checkpoint, distributed
from cllip_fast.train.config import Config, parse
from cllip_fast.train.main import train
from cllip_fast.train.optimizer import create_optimizer, freeze_towers, layer_rate, learning_rate, set_learning_rate
from tests.interchange.peers import small_model
from tests.ranks import on_ranks


def test_layers_are_counted_from_the_towers_end() -> None:
    model = small_model()  # 2 vision and 3 text layers
    expected = {
        "logit_scale": 0,
        "visual.project.weight": 0,
        "visual.norm_out.bias": 0,
        "visual.blocks.1.mlp.0.weight": 1,
        "visual.blocks.0.norm_1.weight": 2,
        "visual.stem.weight": 3,
        "visual.class_token": 3,
        "visual.positions": 3,
        "visual.norm_in.weight": 3,
        "text.blocks.2.norm_1.weight": 1,
        "text.tokens.weight": 4,
        "prompter.qkv.weight": None,
        "region_logit_scale": None,
    }
    names = dict(model.named_parameters())
    for name, layers in expected.items():
        assert name in names
        assert layers_above(name, model.config) == layers, name


def test_every_parameter_gets_its_layers_rate() -> None:
    model = small_model()
    config = Config(layer_decay=0.5, lr=1.0, warmup=10, steps=100)
    optimizer = create_optimizer(model, config)
    set_learning_rate(optimizer, 40, config)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == pytest.approx(
            learning_rate(40, config) * 0.5 ** (layers_above(name, model.config) or 0)
        )
    plain = create_optimizer(model, Config(wd=0.3))
    decayed = {p for group in plain.param_groups for p in group["params"] if group["weight_decay"]}
    assert {p for group in optimizer.param_groups for p in group["params"] if group["weight_decay"]} == decayed


def test_thawed_towers_warm_up() -> None:
    config = Config(pretrained="x", freeze_steps=20, warmup=10, steps=200, lr=1.0, layer_decay=0.5)
    assert [layer_rate(step, config, None) for step in (0, 19, 25)] == [
        learning_rate(step, config) for step in (0, 19, 25)
    ]
    shares = [layer_rate(step, config, 1) / learning_rate(step, config) for step in (0, 19, 20, 24, 29, 100)]
    assert shares == pytest.approx([0, 0, 0.05, 0.25, 0.5, 0.5])


def test_freezing_leaves_what_clip_does_not_have() -> None:
    model = small_model()
    frozen = freeze_towers(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(TOWERS)
    assert len(frozen) == sum(not p.requires_grad for p in model.parameters())
    other = small_model(region="roi_align", share_logit_scale=True)
    with pytest.raises(InputError, match="--freeze-steps leaves nothing to train"):
        freeze_towers(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "--layer-decay is 0.0, expected more than 0, up to 1"),
        ({"layer_decay": 1.5}, "--layer-decay is 1.5"),
        ({"layer_decay": math.nan}, "--layer-decay is nan"),
        ({"freeze_steps": -1}, "--freeze-steps is -1"),
        ({"freeze_steps": 5}, "--freeze-steps is 5, expected 0 without --pretrained"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**options)


def finetune(rank: int, world_size: int, folder: str, **options: object) -> None:
    """4 steps from given weights, the first 2 with frozen towers; a checkpoint after each two."""
    root = Path(folder)
    flags = {
        "train-data": root / "scenes" / "train", "logs-dir": root, "name": f"of{world_size}", "device": "cpu",
        "losses": "clip,region,grounding", "pretrained": root / "start.pt", "freeze-steps": 2, "layer-decay": 0.8,
        "warmup": 1, "steps": 4, "save-frequency": 2, "batch-size": 8 // world_size, "log-every-n-steps": 1,
    } | options  # fmt: skip
    config = parse([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    group = torch.distributed.group.WORLD if world_size > 1 else None
    train(config, distributed.World(rank, world_size, torch.device("cpu"), group))


def finetune_and_resume(rank: int, world_size: int, folder: str) -> None:
    """The run, and its second half again from the checkpoint in the middle."""
    finetune(rank, world_size, folder)
    middle = Path(folder, "of1", "checkpoints", "step_00000002.pt")
    finetune(rank, world_size, folder, name="resumed", resume=middle)


@pytest.mark.slow
def test_towers_start_from_the_weights_stay_frozen_then_learn(tmp_path: Path) -> None:
    scenes = make_scenes(tmp_path / "scenes", train=24, val=4, unseen=4, processes=1)
    vocabulary = load_tokenizer(read_dataset_info(str(scenes / "train")).tokenizer_path).vocab_size
    torch.manual_seed(9)  # not the run's seed
    model = create_model("tiny", vocab_size=vocabulary, region="roi_align")
    torch.save({"model": model.state_dict(), "model_config": model.config.to_dict()}, tmp_path / "start.pt")
    on_ranks(1, finetune_and_resume, str(tmp_path))
    on_ranks(2, finetune, str(tmp_path))

    start = model.state_dict()
    middle, end = (checkpoint.read(tmp_path / "of1" / "checkpoints" / f"step_0000000{n}.pt")["model"] for n in (2, 4))
    for name, x in middle.items():
        assert name not in start or torch.equal(x, start[name]) or name == "region_logit_scale", name
        if name.startswith(TOWERS):
            assert not torch.equal(x, end[name]), name
    assert any(not torch.equal(middle[name], end[name]) for name in middle if name.startswith("prompter."))
    resumed = checkpoint.read(tmp_path / "resumed" / "checkpoints" / "step_00000004.pt")["model"]
    assert all(torch.equal(end[name], resumed[name]) for name in end)
    lines = (tmp_path / "of1" / "log.jsonl").read_text().splitlines()
    other = (tmp_path / "of2" / "log.jsonl").read_text().splitlines()
    curves = [[json.loads(line)["loss"] for line in log if "loss" in line] for log in (lines, other)]
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)
