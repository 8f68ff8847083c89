"""The learning rate at the points one would check by hand; optimizers by name; steps that are skipped."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from cllip_fast import extras
from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel, create_model, layers_above
from cllip_fast.train.config import Config
from cllip_fast.train.muon import MuonAdamW
from cllip_fast.train.optimizer import create_optimizer, learning_rate, set_learning_rate, step_unless


def test_warm_up_then_cosine_to_zero() -> None:
    config = Config(lr=2.0, warmup=10, steps=110)
    assert learning_rate(0, config) == pytest.approx(0.2)
    assert learning_rate(9, config) == pytest.approx(2.0)
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(1.0)
    assert learning_rate(110, config) == pytest.approx(0.0)
    rates = [learning_rate(step, config) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up() -> None:
    assert learning_rate(0, Config(lr=2.0, warmup=0, steps=10)) == pytest.approx(2.0)


# Other optimizers


def tiny() -> CllipModel:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "vocab_size": 20, "text_length": 5, "embed_dim": 8, "vision_width": 16,
             "vision_depth": 2, "vision_heads": 2, "text_width": 8, "text_depth": 1, "text_heads": 2}  # fmt: skip
    return create_model("tiny", **sizes)


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_muon_takes_the_matrices_of_blocks_and_prompter_and_adamw_the_rest(layer_decay: float) -> None:
    """Each as torch's own optimizer would, at the rate and with the decay of the parameter's group."""
    config = Config(opt="muon", lr=0.01, wd=0.3, warmup=0, steps=10, layer_decay=layer_decay)
    model = tiny()
    optimizer, before = create_optimizer(model, config), weights(model)
    set_learning_rate(optimizer, 0, config)
    give_gradients(model)
    step_unless(torch.tensor(0.0), optimizer)
    by_muon = {name for name, each in model.named_parameters() if "momentum_buffer" in optimizer.state[each]}
    hidden = (".blocks.", "prompter.qkv", "prompter.out", "prompter.mlp")
    assert by_muon == {
        name for name, each in model.named_parameters() if each.dim() == 2 and any(part in name for part in hidden)
    }
    assert len(by_muon) == 4 * 3 + 4
    for name, parameter in model.named_parameters():
        copy = nn.Parameter(before[name])
        copy.grad = parameter.grad
        layers = layers_above(name, model.config)
        lr = 0.01 * layer_decay ** (0 if layers is None else layers)
        if name in by_muon:
            alone = torch.optim.Muon([copy], lr=lr, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        else:
            decay = 0.3 if any(parameter is each for group in optimizer.param_groups if group["weight_decay"]
                               for each in group["params"]) else 0.0  # fmt: skip
            alone = torch.optim.AdamW([copy], lr=lr, weight_decay=decay, betas=(0.9, 0.98), eps=1e-6)
        alone.step()
        torch.testing.assert_close(parameter, copy, msg=name)


def test_muon_goes_on_from_its_state() -> None:
    config, one, other = Config(opt="muon"), tiny(), tiny()
    whole, first, second = (create_optimizer(model, config) for model in (one, other, other))
    for seed in range(4):
        give_gradients(one, seed)
        whole.step()
        give_gradients(other, seed)
        (first if seed < 2 else second).step()
        if seed == 1:
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            buffer.seek(0)
            second.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(opt: str) -> None:
    model = tiny()
    optimizer, before = create_optimizer(model, Config(opt=opt)), weights(model)
    give_gradients(model)
    model.visual.project.weight.grad[0, 0] = torch.inf
    step_unless(torch.tensor(1.0), optimizer)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    give_gradients(model)
    step_unless(torch.tensor(0.0), optimizer)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_muon_takes_matrices_only() -> None:
    adam = {"lr": 1.0, "betas": (0.9, 0.98), "eps": 1e-6}
    with pytest.raises(InputError, match=r"Muon got a parameter of shape \[3\], expected matrices only"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))]}], [], **adam)


class Fused(torch.optim.AdamW):
    """Apex's by their documented arguments, on torch's AdamW: none of `fused`, state of the steps in the group."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, **options):  # fmt: skip
        assert bias_correction
        assert adam_w_mode
        super().__init__(params, lr, betas, eps, weight_decay)
        self.options = options

    def zero_grad(self):  # takes no argument
        super().zero_grad()


class FusedLAMB(Fused):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):  # fmt: skip
        assert max_grad_norm == math.inf  # the kernel divides by norm / max_grad_norm where that is above 1
        super().__init__(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay)


@pytest.mark.parametrize("opt", ["apex-adam", "apex-lamb"])
def test_apex_gets_our_groups_and_options(opt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    apex.optimizers, optimizers.FusedAdam, optimizers.FusedLAMB = optimizers, Fused, FusedLAMB
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr(extras, "probe", extras.probe.__wrapped__)
    config = Config(opt=opt, lr=0.1, wd=0.3, beta2=0.9, eps=1e-4)
    model, plain = tiny(), tiny()
    ours, theirs = create_optimizer(model, config), create_optimizer(plain, dataclasses.replace(config, opt="adamw"))
    assert type(ours) is (Fused if opt == "apex-adam" else FusedLAMB)
    before = weights(model)
    for found_inf in (1.0, 0.0):
        give_gradients(model)
        step_unless(torch.tensor(found_inf), ours)
        if found_inf:
            assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    give_gradients(plain)
    theirs.step()
    torch.testing.assert_close(weights(model), weights(plain))

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    optimizers.FusedAdam = optimizers.FusedLAMB = refuse
    with pytest.raises(InputError, match=f"--opt {opt} cannot be used here: .*requires cuda extensions"):
        create_optimizer(model, config)


def test_apex_is_refused_where_it_is_absent() -> None:
    if extras.probe("apex"):
        pytest.skip("Apex is installed here")
    with pytest.raises(InputError, match="--opt apex-adam needs apex, which cannot be imported here"):
        create_optimizer(tiny(), Config(opt="apex-adam"))
