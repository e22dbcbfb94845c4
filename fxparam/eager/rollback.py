"""Put back what running a user's code on modules has changed of them.

A parametrization is run before it is registered, a module is run on fake tensors to see what it
does: neither may leave a trace, as buffers that count, tensors written in place, attributes that
keep the last result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from fxparam._torch.tensors import geometry, storage_of, version_of

__all__ = ["Attributes", "attributes_kept", "unchanged", "unchanged_if_refused"]

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def attributes_kept(root: Module) -> Iterator[None]:
    """Give ``root`` and the modules in it their attributes back, whatever the block assigned."""
    before = Attributes(root.modules())
    try:
        yield
    finally:
        before.restore()


class unchanged_if_refused:  # noqa: N801  # used as a function
    """Give modules their attributes and their tensors' values back if the block raises.

    A class: Dynamo would compile the helpers of ``contextlib`` where code after a graph break
    assigns a parametrized tensor.

    Args:
        roots: modules, with all that are in them.
        tensor: one more tensor, which none of them holds.
    """

    def __init__(self, *roots: Module, tensor: Tensor | None = None) -> None:
        self._modules = [module for root in roots for module in root.modules()]
        self._held = {id(t): t for module in self._modules for t in _tensors_of(module)}
        if tensor is not None:
            self._held[id(tensor)] = tensor
        self._steps: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        attributes = Attributes(self._modules)
        self._steps = [attributes.restore, *map(_values, self._held.values())]

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            for restore in self._steps:
                restore()


class unchanged(unchanged_if_refused):  # noqa: N801  # used as a function
    """Give modules their attributes and their tensors' values back after the block."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for restore in self._steps:
            restore()


def _tensors_of(module: Module) -> Iterator[Tensor]:
    """Yield the parameters, buffers and plain tensor attributes that a module itself holds."""
    for store in (module._parameters, module._buffers, module.__dict__):
        yield from (value for value in store.values() if isinstance(value, Tensor))


class Attributes:
    """The attributes of modules, as they are now, to be put back later.

    Remembered are the attributes themselves, parameters and buffers included, and what is in those
    that are dictionaries, lists or sets; of tensors the identity, not the values.

    Args:
        modules: the modules; not their submodules.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        # Apart from the attributes: a scripted module's are elsewhere.
        self._training: list[tuple[Module, bool]] = []
        self._before: list[tuple[Any, Any]] = []
        for module in modules:
            self._training.append((module, module.training))
            attributes = vars(module)
            containers = (v for v in attributes.values() if type(v) in _CONTAINERS)
            self._before += [(each, each.copy()) for each in (attributes, *containers)]

    def restore(self) -> None:
        """Put the attributes back."""
        for container, content in self._before:
            if not _is_same(container, content):
                container.clear()
                refill = container.extend if isinstance(container, list) else container.update
                refill(content)
        for module, mode in self._training:
            module.training = mode


def _is_same(container: Any, content: Any) -> bool:
    """Check whether two containers hold the same objects, which need not be comparable by value."""
    same = list(map(id, container)) == list(map(id, content))
    if same and isinstance(container, dict):
        return list(map(id, container.values())) == list(map(id, content.values()))
    return same


def _values(tensor: Tensor) -> Callable[[], None]:
    """Return a function that puts the values of a tensor back, if they were changed."""
    if is_lazy(tensor) or tensor.is_inference():
        # No values yet; or no version counter, and not to be written outside inference mode.
        return lambda: None
    alias, version, asks = tensor.detach(), version_of(tensor), tensor.requires_grad
    saved = alias.clone()

    def restore() -> None:
        with torch.no_grad():
            if _place(tensor) != _place(alias):
                tensor.data = alias
            if version_of(tensor) != version or _was_written_unseen(tensor, saved):
                tensor.copy_(saved)
            if tensor.requires_grad != asks:
                tensor.detach_().requires_grad_(asks)

    return restore


def _was_written_unseen(tensor: Tensor, saved: Tensor) -> bool:
    """Check whether a buffer has other values: batch norm writes its own without a new version.

    Parameters and wrappers are no running statistics. To compare a ``DTensor`` is a collective, and
    a tensor of the meta device has no values.
    """
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    return plain and not torch.equal(tensor, saved)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return the storage of a tensor, None if it has none, and how the tensor lies in it."""
    return storage_of(tensor), geometry(tensor)
