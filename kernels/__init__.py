"""Kernels: one folder an operation. `tiles.py` is plain PyTorch, the specification and the fallback of faster ones.

A kernel sees one block of scores: this rank's rows × the columns of one gathered chunk. It knows nothing of ranks,
autograd or reductions; `cllip_fast.streaming` walks the chunks and owns those.
"""
