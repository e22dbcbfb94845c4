"""Inductor overwrites operands of loops and branches in backward that are read again.

AOTAutograd tells Inductor the positions, among a backward graph's inputs, of the saved tensors that
it may overwrite ("donated buffers"). Inductor takes them for positions among the inputs of each
body too. Without donated buffers nothing that was saved is overwritten.

Affected: torch 2.11 to 2.14. Mended in 2.15: https://github.com/pytorch/pytorch/pull/193960.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fxparam._torch.names import functorch_config

__all__ = ["keep_saved_tensors"]


def keep_saved_tensors(*, has_bodies: bool) -> AbstractContextManager[Any]:
    """Let no backward work in the memory of what forward saved, while a graph is compiled.

    Args:
        has_bodies: whether the graph runs bodies; the setting of a graph without any stays.
    """
    if not has_bodies:
        return nullcontext()
    patched: AbstractContextManager[Any] = functorch_config().patch(donated_buffer=False)
    return patched
