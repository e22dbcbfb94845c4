"""The sharded parameters behind those that ``fully_shard`` gathers.

FSDP2 puts a gathered parameter into a module for its forward, the same object each time, with its
version kept. What tells that it changed is the sharded parameter, which the optimizer writes. FSDP2
knows by module and name where to put each: whoever moves a parameter to another module tells it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import Tensor
from torch.nn import Module

__all__ = ["Place", "gathered", "is_sharding", "places", "shard_behind"]

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
        is_tied: whether other modules hold it as well.
        was_gathered: whether it was whole when it was asked for.
    """

    def __init__(self, group: Any, parameter: Any) -> None:
        self._group, self._parameter = group, parameter
        self._held: Any = parameter._module_info
        # A module that has several names is there several times.
        self.is_tied = any(each is not self._held.module for each in self._held.shared_modules)
        self.was_gathered = group.is_unsharded

    @property
    def casts(self) -> bool:
        """Whether what is gathered has another dtype than what is sharded; known once gathered."""
        return self._parameter.param_dtype not in (None, self._parameter.sharded_param.dtype)

    @property
    def root(self) -> Any:
        """The module that was given to ``fully_shard``."""
        return self._group.modules[0]

    def is_at(self, module: Module, names: Collection[str]) -> bool:
        """Check whether a module holds the parameter, by one of some names."""
        held = self._held
        modules = (held.module, *held.shared_modules)
        known = zip(modules, (held.param_name, *held.shared_param_names), strict=True)
        return any(each is module and name in names for each, name in known)

    def move(self, module: Module, name: str) -> None:
        """Let the parameter be put into another module from now on.

        The modules that hold parameters have hooks that shard these for a state dict.
        """
        held, group = self._held, self._group
        held.module, held.param_name = module, name
        held.shared_modules[:] = [module] * len(held.shared_modules)
        held.shared_param_names[:] = [name] * len(held.shared_param_names)
        registered = (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        )
        if registered[0]:
            for handles in registered:
                for handle in handles.values():
                    handle.remove()
                handles.clear()
            group._register_state_dict_hooks()


def places(modules: Iterable[Module]) -> list[Place]:
    """Return the parameters of some modules that ``fully_shard`` shards."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    known = {id(module) for module in modules}
    return [
        Place(group, each)
        for group, each in _parameters()
        if not known.isdisjoint(
            map(id, (each._module_info.module, *each._module_info.shared_modules))
        )
    ]


def is_sharding(module: Module) -> bool:
    """Check whether a module is in one that was given to ``fully_shard``."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    roots = {id(each): each for group, _ in _parameters() for each in group.modules}
    return any(module is each for root in roots.values() for each in root.modules())


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
    mapping = getattr(states, "_module_state_mapping", {})
    # Its own dictionary: after a graph break Dynamo would compile the methods of weak ones.
    for state in list(getattr(mapping, "data", mapping).values()):
        held = state() if isinstance(state, ref) else state
        groups = getattr(held, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(held, "_fsdp_param_group", None)]
        for group in groups:
            yield from ((group, each) for each in getattr(group, "fsdp_params", ()))
