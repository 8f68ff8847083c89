"""The work that a step is for, as model FLOPs utilization (arXiv 2204.02311, appendix B) counts it."""

from __future__ import annotations

from dataclasses import replace

from cllip_fast.plan.layers import model_costs
from cllip_fast.plan.loss import loss_cost
from cllip_fast.plan.settings import Settings


def useful_flops(run: Settings, *, frozen_towers: bool = False) -> int:
    """Floating-point operations of a step on one GPU that model and losses need, two a multiply-add.

    What is computed a second time to save memory counts once: checkpointed blocks, GradCache's first pass, the scores
    that streamed losses compute again in backward. Texts count at their full length, every region as real.

    Args:
        run: model, batch, losses and GPUs; its other fields do not matter.
        frozen_towers: CLIP's towers have no backward pass. (What the Prompter would hand down to them still counts.)
    """
    costs = model_costs(replace(run, grad_checkpointing="none"))
    model = sum(
        cost.forward + (0 if frozen_towers and "tower" in name else cost.backward) for name, cost in costs.items()
    )
    return 2 * (run.accum_freq * model + loss_cost(run).products - _scores_again(run))


def _scores_again(run: Settings) -> int:
    """Multiply-adds of scores that `loss_cost` counts a second time, in backward."""
    images, texts = run.batch_size * run.accum_freq, run.regions * run.accum_freq
    rows, columns = run.config.patch_grid
    pairs = {
        "clip": images * images * run.gpus,
        "region": texts * texts * run.gpus,
        "localization": texts * rows * columns,
    }
    return run.config.embed_dim * sum(pairs.get(loss, 0) for loss in run.losses)
