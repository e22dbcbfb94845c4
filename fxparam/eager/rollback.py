"""Put back what running a user's code on modules has changed of them.

A parametrization is run before it is registered, a module is run on fake tensors to see what it
does: neither may leave a trace, as buffers that count, tensors written in place, attributes that
keep the last result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from fxparam._torch.tensors import storage_identity

__all__ = ["attributes_kept", "unchanged_if_refused"]

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def attributes_kept(root: Module) -> Iterator[None]:
    """Give ``root`` and the modules in it their attributes back, whatever the block assigned."""
    restore = _attributes(list(root.modules()))
    try:
        yield
    finally:
        restore()


@contextmanager
def unchanged_if_refused(*roots: Module, tensor: Tensor | None = None) -> Iterator[None]:
    """Give modules their attributes and their tensors' values back if the block raises.

    Args:
        roots: modules, with all that are in them.
        tensor: one more tensor, which none of them holds.
    """
    modules = [module for root in roots for module in root.modules()]
    held = {id(t): t for module in modules for t in _tensors_of(module)}
    if tensor is not None:
        held[id(tensor)] = tensor
    steps = [_attributes(modules), *map(_values, held.values())]
    try:
        yield
    except BaseException:
        for restore in steps:
            restore()
        raise


def _tensors_of(module: Module) -> Iterator[Tensor]:
    """Yield the parameters, buffers and plain tensor attributes that a module itself holds."""
    for store in (module._parameters, module._buffers, module.__dict__):
        yield from (value for value in store.values() if isinstance(value, Tensor))


def _attributes(modules: Sequence[Module]) -> Callable[[], None]:
    """What puts attributes back, and what is in those that are containers."""
    # Apart from the attributes: a scripted module's are elsewhere.
    training = [(module, module.training) for module in modules]
    containers: list[Any] = []
    for module in modules:
        attributes = vars(module)
        containers += [attributes, *(v for v in attributes.values() if type(v) in _CONTAINERS)]
    before = [(container, container.copy()) for container in containers]

    def restore() -> None:
        for container, content in before:
            if not _is_same(container, content):
                container.clear()
                refill = container.extend if isinstance(container, list) else container.update
                refill(content)
        for module, mode in training:
            module.training = mode

    return restore


def _is_same(container: Any, content: Any) -> bool:
    """Check whether two containers hold the same objects, which need not be comparable by value."""
    same = list(map(id, container)) == list(map(id, content))
    if same and isinstance(container, dict):
        return list(map(id, container.values())) == list(map(id, content.values()))
    return same


def _values(tensor: Tensor) -> Callable[[], None]:
    """What puts the values of a tensor back, if they were written or exchanged."""
    if is_lazy(tensor) or tensor.is_inference():
        # No values yet; or no version counter, and not to be written outside inference mode.
        return lambda: None
    alias, version, asks = tensor.detach(), tensor._version, tensor.requires_grad
    saved = alias.clone()

    def restore() -> None:
        with torch.no_grad():
            if _memory(tensor) != _memory(alias):
                tensor.data = alias
            if tensor._version != version:
                tensor.copy_(saved)
            if tensor.requires_grad != asks:
                tensor.detach_().requires_grad_(asks)

    return restore


def _memory(tensor: Tensor) -> tuple[object, ...]:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return storage_identity(tensor)[1], tensor.shape, strides
