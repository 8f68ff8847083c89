"""Second derivatives, which the streaming operators do not have, are refused in words."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from torch.library import CustomOpDef


def differentiable_once(backward: CustomOpDef) -> None:
    """Make differentiating through `backward`, an operator named "namespace::name_backward", raise a clear error.

    Only the second derivative raises: a gradient taken with `create_graph=True` is as good as any other.
    """
    name = backward._qualname.removesuffix("_backward")

    def refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{name} is differentiable once: there is no derivative of its gradient. A loss of gradients, such as a "
            "gradient penalty, needs one written in plain PyTorch operations"
        )

    backward.register_autograd(refuse)
