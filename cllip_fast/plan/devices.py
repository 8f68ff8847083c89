"""The GPUs that a run can be planned for, with the figures of their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.errors import check_choice

GIB = 2**30
NODE_GPUS = 8
NETWORK_BANDWIDTH = 50e9
"""Bytes/s of each GPU to other nodes, one way: one 400 Gbit/s adapter a GPU."""

RESERVED = int(2.5 * GIB)
"""What the driver withholds of the sheet's size, CUDA context, libraries' workspaces, NCCL's buffers: an assumption."""


@dataclass(frozen=True)
class Device:
    """One GPU: memory in bytes, dense peaks in FLOP/s, bandwidths in bytes/s (the link's is one way)."""

    name: str
    memory: int
    bf16: float
    tf32: float
    bandwidth: float
    link: float

    def interconnect(self, gpus: int) -> float:
        """Bytes/s that a GPU sends, and receives, in a collective of `gpus` GPUs."""
        return self.link if gpus <= NODE_GPUS else min(self.link, NETWORK_BANDWIDTH)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA's data sheets, SXM forms. Sheets that quote peaks with sparsity are halved; so are NVLink's two ways.
        Device("a100", 80 * GIB, 312e12, 156e12, 2.039e12, 300e9),
        Device("h100", 80 * GIB, 989e12, 494e12, 3.35e12, 450e9),
        Device("h200", 141 * GIB, 989e12, 494e12, 4.8e12, 450e9),
        Device("b200", 180 * GIB, 2250e12, 1125e12, 8.0e12, 900e9),
    )
}


def find_device(name: str) -> Device:
    """The device called `name`. Raises `InputError` for another name."""
    return DEVICES[check_choice("--device", name, tuple(DEVICES))]
