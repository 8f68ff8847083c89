"""How parameters lie on the ranks: copied (ddp), sharded (fsdp), or sharded among few and copied to others (hsdp).

The weights that the optimizer sees are fp32 and autocast stays in charge, whichever it is. Under fsdp and hsdp (FSDP2,
`fully_shard`) each transformer block is gathered on its own, in autocast's type: half the bytes, and the numbers that
autocast would make of them; its norms in fp32, as autocast leaves them. Gradients are reduced in fp32. What belongs to
no block (embeddings, Prompter, last norms) is gathered as one, in fp32. Temperatures, which have no dimension to be cut
along, are copied everywhere.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel
from cllip_fast.models.blocks import Block
from cllip_fast.train.config import Config
from cllip_fast.train.distributed import World


def shard(model: CllipModel, config: Config, world: World, dtype: torch.dtype | None) -> CllipModel:
    """Shard the model in place for fsdp and hsdp; do nothing for ddp. Before the optimizer is made.

    Args:
        dtype: autocast's, in which the blocks' weights are gathered; None without autocast.

    Raises:
        InputError: a single process, or ranks that `--shard-size` does not divide.
    """
    if config.parallel == "ddp":
        return model
    mesh = _mesh(config, world)
    # The model gives some outputs as views; nobody changes them in place, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, Block):
            if dtype is not None:
                fully_shard([module.norm_1, module.norm_2], mesh=mesh)
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy)
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_average)
    return model


def _mesh(config: Config, world: World) -> DeviceMesh:
    if world.size == 1:
        raise InputError(f"--parallel is {config.parallel}, which shards over several processes, and this is the only "
                         "one; expected ddp")  # fmt: skip
    if config.parallel == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.size % size:
        raise InputError(f"--shard-size is {size}, expected a divisor of the {world.size} ranks")
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def _average(parameter: Tensor) -> None:
    """Mean of a gradient over all ranks, as FSDP2 takes it of those it reduces."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def wrap(model: CllipModel, world: World) -> nn.Module:
    """What is called in training: DDP around a model of several ranks, unless `shard` has dealt with it."""
    return DistributedDataParallel(model) if world.size > 1 and not is_sharded(model) else model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def no_sync(wrapped: nn.Module) -> Iterator[None]:
    """Backward in here leaves gradients on their rank; the next one outside reduces what has been added up."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        yield


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` by the norm over all ranks' shards, which it returns as a plain tensor []; 0: none."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return norm


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part, a copy, of a tensor that each rank has whole, cut as `parameter` is; nothing is sent."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()


def unsharded(model: CllipModel) -> CllipModel:
    """The model as a rank can call it by itself: as it is, or a copy gathered from all ranks, which all ask for it."""
    if not is_sharded(model):
        return model
    with torch.random.fork_rng(devices=[]):  # the copy's initial weights are drawn for nothing
        copy = CllipModel(model.config)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy.load_state_dict(state, assign=True)
    return copy.to(model.logit_scale.device)
