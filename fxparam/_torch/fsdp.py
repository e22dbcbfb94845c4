"""The sharded parameters behind those that ``fully_shard`` gathers.

FSDP2 puts a gathered parameter into a module for its forward, the same object each time, with its
version kept. What tells that it changed is the sharded parameter, which the optimizer writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import ref

from torch import Tensor

__all__ = ["shard_behind"]

# For tensors that were asked for, by identity, what holds them weakly, and their shard.
_known: dict[int, tuple[ref[Tensor], ref[Any] | None]] = {}


def shard_behind(tensor: Tensor) -> Tensor | None:
    """Return the sharded parameter that one was gathered from; None for any other tensor.

    It is a ``DTensor``. Its own version counts writes to it: those that its local tensor gets below
    autograd are not counted there.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    known = _known.get(id(tensor))
    if known is None:
        known = _known[id(tensor)] = ref(tensor, _forgetting(id(tensor))), _find(tensor)
    parameter = None if known[1] is None else known[1]()
    return None if parameter is None else parameter.sharded_param


def _forgetting(identity: int) -> Any:
    return lambda _: _known.pop(identity, None)


def _find(tensor: Tensor) -> ref[Any] | None:
    """Return what gathers a tensor."""
    for parameter in _parameters():
        if getattr(parameter, "_unsharded_param", None) is tensor:
            return ref(parameter)
    return None


def _parameters() -> Iterator[Any]:
    """Yield what FSDP2 holds of each parameter that it shards."""
    states = sys.modules.get("torch.distributed._composable_state")
    for state in list(getattr(states, "_module_state_mapping", {}).values()):
        held = state() if isinstance(state, ref) else state
        groups = getattr(held, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(held, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())
