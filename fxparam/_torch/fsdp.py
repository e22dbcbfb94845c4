"""The sharded parameters behind those that ``fully_shard`` gathers.

FSDP2 puts a gathered parameter into a module for its forward, the same object each time, with its
version kept. What tells that it changed is the sharded parameter, which the optimizer writes. FSDP2
knows by module and name where to put each: whoever moves a parameter to another module tells it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import Tensor
from torch.nn import Module

__all__ = ["Place", "gathered", "places", "shard_behind"]

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
        for _, each in _parameters():
            _known[id(getattr(each, "_unsharded_param", each))] = ref(each)
        known = _known.get(id(tensor))
        found = None if known is None else known()
    return None if found is None else found.sharded_param


class Place:
    """A parameter that ``fully_shard`` shards, and where it puts it.

    Attributes:
        name: in the module that holds it.
        is_tied: whether other modules hold it as well.
        was_gathered: whether it was whole when it was asked for.
    """

    def __init__(self, group: Any, parameter: Any) -> None:
        self._parameter, self._root = parameter, group.modules[0]
        self._held: Any = parameter._module_info
        self.name: str = self._held.param_name
        self.is_tied = bool(self._held.shared_modules)
        self.was_gathered = group.is_unsharded

    @property
    def casts(self) -> bool:
        """Whether what is gathered has another dtype than what is sharded; known once gathered."""
        return self._parameter.param_dtype not in (None, self._parameter.sharded_param.dtype)

    @property
    def root(self) -> Any:
        """The module that was given to ``fully_shard``."""
        return self._root

    @property
    def module(self) -> Module:
        """The module that holds the parameter."""
        return self._held.module  # type: ignore[no-any-return]

    def move(self, module: Module, name: str) -> None:
        """Let the parameter be put into another module from now on."""
        self._held.module, self._held.param_name = module, name


def places(modules: Iterable[Module]) -> list[Place]:
    """Return the parameters of some modules that ``fully_shard`` shards."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    known = {id(module) for module in modules}
    return [
        Place(group, each) for group, each in _parameters() if id(each._module_info.module) in known
    ]


@contextmanager
def gathered(places: Iterable[Place]) -> Iterator[None]:
    """Let parameters be whole in a block. All ranks enter it, as they gather together."""
    roots = {id(each.root): each.root for each in places if not each.was_gathered}
    for root in roots.values():
        root.unshard()
    try:
        yield
    finally:
        for root in roots.values():
            root.reshard()


def _parameters() -> Iterator[tuple[Any, Any]]:
    """Yield what FSDP2 holds of each parameter that it shards, after its group's."""
    states = sys.modules.get("torch.distributed._composable_state")
    for state in list(getattr(states, "_module_state_mapping", {}).values()):
        held = state() if isinstance(state, ref) else state
        groups = getattr(held, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(held, "_fsdp_param_group", None)]
        for group in groups:
            yield from ((group, each) for each in getattr(group, "fsdp_params", ()))
