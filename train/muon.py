"""Muon for hidden matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from cllip_fast.errors import InputError


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` on one list of groups and fused AdamW on another; state, groups and `state_dict` are joined.

    Muon's update is scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate and one
    weight decay serve both. A query-key-value projection is orthogonalised as the one matrix that it is here.

    Raises:
        InputError: a parameter that is no matrix among `matrices`.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ) -> None:
        for parameter in (each for group in matrices for each in group["params"]):
            if parameter.dim() != 2:
                raise InputError(f"Muon got a parameter of shape {list(parameter.shape)}, expected matrices only")
        self._muon = Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        # The same dicts: each group keeps the options that its own optimizer has given it.
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        # Anew each time: `load_state_dict` puts others in their place.
        for part, option in ((self._muon, "momentum"), (self._adamw, "betas")):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if option in group]
            part.step()
        return result
