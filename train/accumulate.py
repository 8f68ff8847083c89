"""Exact gradient accumulation for losses that compare each sample with all others (GradCache, arXiv 2101.06983).

Averaging the gradients of micro-batches is another loss: each would see only its own negatives. Two passes give that of
the large batch, in the memory of one micro-batch and the outputs of all:

    pass 1   every micro-batch through the model, no graph; its outputs are kept
             one loss over the joined outputs, and its gradient for them
    pass 2   every micro-batch again, with graph; backward starts from its rows of that gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from cllip_fast.errors import InputError, check_tensor

SCALAR = ((), (1,))  # shapes of a logit scale or bias
Outputs = Mapping[str, Any]


def accumulate(
    forward: Callable[[Any], Outputs],
    loss: Callable[..., Tensor | dict[str, Tensor]],
    batches: Sequence[Any],
    *,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of one large batch, handed over as micro-batches, to every parameter's `.grad`.

    Value and gradients are the large batch's up to rounding, those of logit scales and biases included. Forward runs
    twice for each micro-batch, on the same random numbers (PyTorch's generators of the CPU and of the current CUDA
    device). A single batch takes the plain way: forward, loss, backward.

        def encode(batch):
            images, texts = batch
            with torch.autocast("cuda", torch.bfloat16):
                return model(images, texts)  # {"image_features": ..., "text_features": ..., "logit_scale": ...}

        loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        losses = accumulate(encode, loss, micro_batches, no_sync=model.no_sync)  # model: DistributedDataParallel
        optimizer.step()
        optimizer.zero_grad()

    Not exact: modules whose outputs depend on the rest of the batch, as BatchNorm's do in training; they see
    micro-batches, twice.

    Args:
        forward: takes a micro-batch, returns the model's outputs by name. Tensors are joined along their first
            dimension, which counts samples; those of shape [] or [1] are taken for scales and biases, and those and
            anything else must be the same for each micro-batch (where looking at them is free: not on a GPU). Autocast
            belongs in here.
        loss: takes the outputs by name, returns a scalar, or scalars by name whose sum is the loss.
        batches: the micro-batches; they may differ in size, not in what `forward` makes of a sample.
        no_sync: `DistributedDataParallel.no_sync` of the model: ranks then reduce gradients once, in the backward of
            the last micro-batch. What is trained must then act through the outputs, scales too.
        scale: `GradScaler.scale` under fp16: the loss is multiplied before backward, so that gradients come out
            multiplied; what is returned is not.

    Returns:
        What the loss gave, by name ("loss" if it gave a tensor), detached.

    Raises:
        InputError: no batches, or outputs of micro-batches that do not fit together.
    """
    if not batches:
        raise InputError("batches is empty, expected at least one micro-batch")
    if len(batches) == 1:
        return _backward(loss, forward(batches[0]), scale)

    outputs, states = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(RandomState.now())
            outputs.append(dict(forward(batch)))
    parts, gradients = _loss_and_gradients(loss, outputs, scale)
    for number, (batch, state, gradient) in enumerate(zip(batches, states, gradients, strict=True), 1):
        with no_sync() if number < len(batches) else nullcontext(), state.replayed():
            output = forward(batch)
            names = [name for name in gradient if output[name].requires_grad]
            with record_function("backward"):
                torch.autograd.backward([output[name] for name in names], [gradient[name] for name in names])
    return parts


@dataclass(frozen=True)
class RandomState:
    """Where PyTorch's generators stand, on the CPU and on the current CUDA device if CUDA is in use."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the numbers that followed this state again; afterwards the generators are as they were."""
        with torch.random.fork_rng([] if self.cuda is None else [torch.cuda.current_device()]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            yield


def _loss_and_gradients(
    loss: Callable[..., Tensor | dict[str, Tensor]],
    outputs: list[dict[str, Any]],
    scale: Callable[[Tensor], Tensor] | None,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The loss of all micro-batches together, and for each of them its gradient by output.

    That of a scale goes to the last one alone, so that it counts once. Empties `outputs`: nothing is held twice.
    """
    if any(output.keys() != outputs[0].keys() for output in outputs):
        raise InputError(f"forward gives {' / '.join(str(sorted(output)) for output in outputs)}, expected equal names")
    joined, sizes = {}, {}
    for name in list(outputs[0]):
        values = [output.pop(name) for output in outputs]
        if isinstance(values[0], Tensor) and values[0].shape not in SCALAR:
            joined[name], sizes[name] = _concatenated(name, values), [len(value) for value in values]
        else:
            joined[name] = _shared(name, values)
    parts = _backward(loss, joined, scale)

    gradients: list[dict[str, Tensor]] = [{} for _ in outputs]
    for name, value in joined.items():
        if not isinstance(value, Tensor) or value.grad is None:
            continue
        if name not in sizes:
            gradients[-1][name] = value.grad
            continue
        for gradient, rows in zip(gradients, value.grad.split(sizes[name]), strict=True):
            gradient[name] = rows
    return parts, gradients


def _concatenated(name: str, values: list[Tensor]) -> Tensor:
    for number, value in enumerate(values):
        check_tensor(f"output {name} of micro-batch {number}", value, ("n", *values[0].shape[1:]))
    return _leaf(torch.cat(values))


def _shared(name: str, values: list[Any]) -> Any:
    for number, value in enumerate(values):
        if not _same(values[0], value):
            raise InputError(
                f"output {name} is {values[0]} in micro-batch 0 and {value} in micro-batch {number}, expected the "
                "same: it has no row for each sample that could be joined"
            )
    return _leaf(values[0]) if isinstance(values[0], Tensor) else values[0]


def _same(one: Any, other: Any) -> bool:
    """Equal, or on a GPU, where looking at values waits for the queue, of equal shape."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and one == other
    return one.shape == other.shape and (one.is_cuda or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


def _backward(
    loss: Callable[..., Tensor | dict[str, Tensor]], outputs: Outputs, scale: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    parts = loss(**outputs)
    parts = parts if isinstance(parts, dict) else {"loss": parts}
    total = sum(parts.values())
    with record_function("backward"):
        (total if scale is None else scale(total)).backward()
    return {name: part.detach() for name, part in parts.items()}
