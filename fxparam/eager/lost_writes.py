"""Warn where the value of a parametrized tensor was written in place, and the write is lost.

nn.init.orthogonal_(layer.weight)       the value is written, dropped, and computed anew when read

When a value dies, its version counter says whether it was written. It is read off an alias that
shares the counter and has no memory, so that nothing is kept alive. Writes inside of a module's
call or of a backward are steps of a computation, and not meant to last.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from typing import Any
from weakref import WeakSet, getweakrefs, ref

import torch
from torch import Tensor
from torch.nn import Module

from fxparam._torch.names import is_plain_eager
from fxparam._torch.tensors import is_view_of_another, version_of

__all__ = ["say_if_lost", "watch"]

# The references to a new value that the functions here and their caller have.
_OURS = 5
# By identity: code that Dynamo makes has constants without a hash, and so has none itself.
_COMPUTING = {
    id(f.__code__) for f in (Module.__call__, torch.autograd.backward, torch.autograd.grad)
}


class _Watch(ref[Tensor]):
    """A weak reference to a value, and how to see that it was written once it is gone.

    Attributes:
        alias: shares the version counter of the value, and not its memory.
        version: the version of the value when it was new.
        chain: its ``ParametrizationList``.
        name: the name of the tensor.
    """

    __slots__ = ("alias", "chain", "name", "version")

    alias: Tensor
    version: int | None
    chain: ref[Module]
    name: str


_watches: set[_Watch] = set()
_said: WeakSet[Module] = WeakSet()
_nothing: dict[torch.device, Tensor] = {}


def watch(value: Any, chain: Module, name: str) -> None:
    """Warn if a new value is written in place, and then dropped.

    Args:
        value: what evaluating ``chain`` has just given. Not watched if others hold it too.
        chain: a ``ParametrizationList``.
        name: the name of the tensor.
    """
    if type(value) is not Tensor or sys.getrefcount(value) > _OURS or not is_plain_eager():
        return
    with suppress(RuntimeError):  # layouts and devices that have no such alias
        if value.is_inference() or _is_memory_of_another(value, chain):
            return
        watched = _Watch(value, _died)
        watched.alias = value.detach()
        watched.alias.data = _without_memory(value)
        watched.version = version_of(watched.alias)
        watched.chain, watched.name = ref(chain), name
        _watches.add(watched)


def _is_memory_of_another(value: Tensor, chain: Module) -> bool:
    """Check whether a write to a value may be one to what it was computed from."""
    held = (*chain._parameters.values(), *chain._buffers.values())
    memory = value.data_ptr()
    return is_view_of_another(value) or any(t is not None and t.data_ptr() == memory for t in held)


def _without_memory(value: Tensor) -> Tensor:
    empty = _nothing.get(value.device)
    if empty is None:
        empty = _nothing[value.device] = value.detach().new_empty(0)
    return empty


def _died(watched: ref[Tensor]) -> None:
    assert isinstance(watched, _Watch)
    _watches.discard(watched)
    _say_if_lost(watched)


def say_if_lost(value: Tensor) -> None:
    """Warn if a value that a region holds was written in place, so that it is computed anew."""
    for watched in getweakrefs(value):
        if isinstance(watched, _Watch):
            _say_if_lost(watched)


def _say_if_lost(watched: _Watch) -> None:
    chain = watched.chain()
    written = version_of(watched.alias) != watched.version
    if not written or chain is None or chain in _said or sys.is_finalizing() or _is_computing():
        return
    _said.add(chain)
    name = watched.name
    warnings.warn(
        f"the value of the parametrized tensor '{name}' was written in place, and the write is "
        f"lost: the value is computed anew at each access.\n"
        f"To initialize it: fxparam.init_(module, '{name}', torch.nn.init.orthogonal_), say.\n"
        f"To assign it: module.{name} = value. To compute with a changed value, change a clone.",
        stacklevel=3,
    )


def _is_computing() -> bool:
    """Check whether a module's call or a backward is going on, or no Python code at all."""
    frame = sys._getframe(3)
    while frame is not None:
        if id(frame.f_code) in _COMPUTING:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
