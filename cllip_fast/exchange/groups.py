"""Names for process groups: an operator's schema can carry a string, not a group."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cllip_fast.errors import InputError

ALONE = ""
WORLD = "world"


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name under which an operator finds `group` again: `ALONE` for None, else the group's registered name."""
    if group is None:
        return ALONE
    if isinstance(group, str):
        return group
    name = getattr(group, "group_name", None)
    if name is None:
        raise InputError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")
    return name


def find_group(name: str) -> dist.ProcessGroup | None:
    """The process group called `name`; None for `ALONE`."""
    if name == ALONE:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(f"group is {name!r}, but torch.distributed is not initialised: call init_process_group first")
    return dist.group.WORLD if name == WORLD else _resolve_process_group(name)
