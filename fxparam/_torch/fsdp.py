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

# What gathers a tensor, by the identity of the tensor. There is no reference to the tensor itself:
# torch swaps none that has weak ones.
_known: dict[int, ref[Any]] = {}


def shard_behind(tensor: Tensor) -> Tensor | None:
    """Return the sharded parameter that one was gathered from; None for any other tensor.

    It is a ``DTensor``. Its own version counts writes to it: those that its local tensor gets below
    autograd are not counted there.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    known = _known.get(id(tensor))
    found = None if known is None else known()
    if found is None or getattr(found, "_unsharded_param", None) is not tensor:
        _known.clear()
        for each in _parameters():
            _known[id(getattr(each, "_unsharded_param", each))] = ref(each)
        known = _known.get(id(tensor))
        found = None if known is None else known()
    return None if found is None else found.sharded_param


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
