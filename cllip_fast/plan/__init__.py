"""What a training run will need before it is started: memory of a GPU, and the least time of a step. Formulas only."""

from cllip_fast.plan.devices import DEVICES, Device, find_device
from cllip_fast.plan.loss import loss_memory
from cllip_fast.plan.memory import Memory, largest_batch, predict_memory
from cllip_fast.plan.report import as_dict, as_text
from cllip_fast.plan.settings import Settings
from cllip_fast.plan.time import StepTime, predict_time

__all__ = [
    "DEVICES",
    "Device",
    "Memory",
    "Settings",
    "StepTime",
    "as_dict",
    "as_text",
    "find_device",
    "largest_batch",
    "loss_memory",
    "predict_memory",
    "predict_time",
]
