"""`torch.compile` for the blocks of a network: what `model.compile` does.

One function, a block's arithmetic, is compiled once for all blocks and all shapes. It is called from within a block's
`forward`, so that sharding gathers the block's weights outside of it, checkpoints recompute it as a whole, and no name
of a weight changes; a copy of a network shares it. Decoding, whose cache grows with every token, runs as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from lit_palm.models.palm import Block

__all__ = ["check_compiler", "compile_blocks"]

BACKEND = "inductor"


def check_compiler(option: str) -> None:
    """Refuse to compile where there is no C++ compiler, by what inductor itself would look for.

    Args:
        option: what asked for it, for the message.

    Raises:
        ValueError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            f"{option}: torch.compile needs a C++ compiler and finds none: install one (g++ or clang++), set CXX to "
            f"it, or leave {option} out"
        ) from error


@cache
def _compiled(backend: str) -> Any:
    return torch.compile(Block.compute, dynamic=True, backend=backend)


def compile_blocks(network: nn.Module) -> None:
    """Let the blocks of a network run compiled, in place, from their next pass on.

    Raises:
        ValueError: it has no blocks of a PaLM, or there is no C++ compiler.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"model.compile compiles the blocks of a PaLM, of which {type(network).__name__} has none")
    if BACKEND == "inductor":
        check_compiler("model.compile")
    for block in blocks:
        block.compiled = _compiled(BACKEND)
