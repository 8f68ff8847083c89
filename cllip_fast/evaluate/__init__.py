"""What a model can do with a split of images, captions and regions: one pass, one flat dict of metrics."""

from cllip_fast.evaluate.evaluation import evaluate
from cllip_fast.evaluate.table import table

__all__ = ["evaluate", "table"]
