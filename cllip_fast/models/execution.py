"""How a model is computed, which changes memory and time and not what is computed."""

from __future__ import annotations

import torch

from cllip_fast.errors import InputError, check_choice
from cllip_fast.models import checkpointing
from cllip_fast.models.attention import attention_backend
from cllip_fast.models.blocks import Block
from cllip_fast.models.cllip import CllipModel
from cllip_fast.models.prompter import Prompter

RECOMPILE_LIMIT = 32


def set_execution(
    model: CllipModel, *, grad_checkpointing: str = "none", text_packing: bool = False, compile: bool = False
) -> None:
    """Set what blocks keep for backward, whether the text tower leaves padding out, and whether blocks are compiled.

    Args:
        grad_checkpointing: one of `checkpointing.MODES`, for the blocks of both towers and the Prompter's layer.
        text_packing: texts are joined into one row of tokens before the blocks, and attention is told where each ends.
        compile: as `compile_blocks` does.

    Raises:
        InputError: an unknown mode, or packing with an attention back end that has no such form.
    """
    check_choice("grad_checkpointing", grad_checkpointing, checkpointing.MODES)
    attention = model.config.attention
    if text_packing and attention_backend(attention).attend_packed is None:
        raise InputError(f"text_packing is on with attention={attention!r}, which has no form for packed texts")
    for module in model.modules():
        if isinstance(module, (Block, Prompter)):
            module.grad_checkpointing = grad_checkpointing
    model.text.packing = text_packing
    if compile:
        compile_blocks(model)


def compile_blocks(model: CllipModel, **options: object) -> None:
    """Compile each transformer block by itself, in place, with `torch.compile`'s `options`.

    Regional compilation: blocks of one shape share their code, so that a tower of 24 costs one compilation and not a
    graph of 24. A block's checkpointing is inside of its compiled region; DDP's and FSDP's hooks are outside.
    """
    # One code serves both towers, with and without gradients, at several lengths: more kinds than torch expects.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**options)
