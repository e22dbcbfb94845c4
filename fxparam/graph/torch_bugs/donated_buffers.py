"""Inductor overwrites operands of loops and regions in backward that are read again.

::

    h = torch.tanh(x @ weight)                  # saved for backward
    scan(step, h, xs)                           # the body's backward works in that memory

AOTAutograd tells Inductor which inputs of a backward graph it may overwrite ("donated buffers"), by
their positions. Inductor looks the same positions up among the inputs of each body, where they are
those of other tensors. The gradients are wrong altogether, without an error. For example, a weight
that was computed in front of a ``scan`` and read in its body, in bfloat16 under autocast, got a
gradient that was off by 72 % on 2.13.0.

Seen on 2.11.0 and 2.13.0. Mended in 2.15.0: https://github.com/pytorch/pytorch/pull/193960; see
also https://github.com/pytorch/pytorch/pull/192840. A user's report:
https://github.com/pytorch/pytorch/issues/153679. ``tests/graph/torch_bugs/test_donated_buffers.py``
shows it.

What we do: a graph with bodies is compiled without donated buffers, so that nothing which forward
saved is overwritten. That costs memory in backward, so it is done only before 2.15.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fxparam._torch.names import functorch_config

__all__ = ["keep_saved_tensors"]

#: This file may go once no older torch is supported.
_MENDED_IN = "2.15"


def keep_saved_tensors(*, has_bodies: bool) -> AbstractContextManager[Any]:
    """Return a context to compile in, in which backward keeps what forward saved.

    Args:
        has_bodies: whether the graph runs bodies; the setting of a graph without any stays.
    """
    if not has_bodies or torch.__version__ >= _MENDED_IN:
        return nullcontext()
    patched: AbstractContextManager[Any] = functorch_config().patch(donated_buffer=False)
    return patched
