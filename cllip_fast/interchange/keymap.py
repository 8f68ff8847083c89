"""A key map says, for each tensor of a `CllipModel`'s two towers, under which keys a peer keeps it.

Maps are complete: what a file has beyond its map, or lacks of it, is an error and never passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cllip_fast.errors import InputError

_SHOWN = 4


class Peer(NamedTuple):
    """Where a peer keeps one of our tensors: parts joined along the first dimension, perhaps transposed."""

    keys: tuple[str, ...]
    transposed: bool = False


KeyMap = dict[str, Peer]


def from_peer(state: Mapping[str, Tensor], names: KeyMap, source: str) -> dict[str, Tensor]:
    """A peer's tensors under our names.

    Raises:
        InputError: `state` lacks keys of the map or has others, or parts do not fit together; names `source`.
    """
    theirs = {key for peer in names.values() for key in peer.keys}
    problems = [
        f"{what} {shorten(keys)}"
        for what, keys in (("lacks", theirs - state.keys()), ("also holds", state.keys() - theirs))
        if keys
    ]
    if problems:
        raise InputError(f"{source} {' and '.join(problems)}")
    ours = {}
    for name, peer in names.items():
        try:
            tensor = torch.cat([state[key] for key in peer.keys]) if len(peer.keys) > 1 else state[peer.keys[0]]
        except RuntimeError as error:
            raise InputError(f"{source}: {', '.join(peer.keys)} do not fit together: {error}") from error
        if peer.transposed and tensor.dim() != 2:
            raise InputError(f"{source}: {peer.keys[0]} has shape {list(tensor.shape)}, expected two dimensions")
        ours[name] = tensor.T if peer.transposed else tensor
    return ours


def to_peer(state: Mapping[str, Tensor], names: KeyMap) -> dict[str, Tensor]:
    """Our tensors under a peer's names: fp32 on the CPU, contiguous, none sharing memory."""
    theirs = {}
    for name, peer in names.items():
        tensor = state[name].detach().to("cpu", torch.float32)
        parts = (tensor.T if peer.transposed else tensor).chunk(len(peer.keys)) if tensor.dim() else (tensor,)
        theirs |= {
            key: part.clone(memory_format=torch.contiguous_format) for key, part in zip(peer.keys, parts, strict=True)
        }
    return theirs


def shorten(keys: Iterable[str]) -> str:
    """The first few keys and how many more there are."""
    keys = sorted(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
