"""The engine: walks the gathered side chunk by chunk, forward and backward; owns autograd and operator registration.

    losses  ->  info_nce / sigmoid_loss / distill    (operators; here)
                Walk: blocks of scores in order      (walk.py, over `exchange`)
                kernels of the chosen back end       (backends.py -> `cllip_fast.kernels`)

A new contrastive loss is a folder of kernels, a line in `backends.py`, and an operator that walks the blocks.
"""

from cllip_fast.streaming.backends import BACKENDS, check_backend
from cllip_fast.streaming.distill import distill
from cllip_fast.streaming.info_nce import info_nce
from cllip_fast.streaming.plan import chunk_argument
from cllip_fast.streaming.sigmoid import sigmoid_loss

__all__ = ["BACKENDS", "check_backend", "chunk_argument", "distill", "info_nce", "sigmoid_loss"]
