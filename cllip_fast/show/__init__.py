"""Pictures of a run: what the model sees and points at, and how it got there."""

from cllip_fast.show.curves import training_curves
from cllip_fast.show.sheet import picture_sheet

__all__ = ["picture_sheet", "training_curves"]
