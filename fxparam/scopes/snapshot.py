"""Snapshots of what a parametrized tensor is computed from, so that no stale value is reused.

A snapshot lists everything an evaluation reads that can be compared: the chain's modules, the
tensors they hold (the originals among them) or can get at through containers, other modules and
what functions close over, and for each tensor its identity, version counter, storage, shape,
strides, dtype and whether it asks for a gradient. Two snapshots of one chain are equal when nothing
of it was exchanged or written in between.

What no version counter sees is not seen here either: a write through ``tensor.data``, through
NumPy, or to a Python attribute of a parametrization other than ``training`` and what holds tensors.
Nor are tensors that are found by a global name, or in an object that is none of the above.

Not the ``Attributes`` of ``fxparam.eager.rollback``: a snapshot is compared and never restored, so
that it holds modules weakly and of tensors the versions, which those need not.
"""

from __future__ import annotations

import operator
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fxparam._torch.fsdp import shard_behind
from fxparam._torch.names import inside_functorch
from fxparam._torch.tensors import (
    functorch_level,
    is_wrapper_subclass,
    storage_identity,
    version_of,
)
from fxparam.scopes.reach import held_by, reached
from fxparam.scopes.state import State

__all__ = ["Snapshot"]

_PLAIN = (Tensor, Parameter)


class Snapshot:
    """The state of a chain at one moment: objects to compare by identity, facts by value.

    Args:
        chain: a ``ParametrizationList``; not kept, as an entry must not keep its own key alive, nor
            are modules, which may hold it: weak references are, of which a module has one.
    """

    __slots__ = ("_functorch", "facts", "level", "objects", "pins", "tracked")

    def __init__(self, chain: Module) -> None:
        self.objects: list[object] = []
        self.facts: list[object] = []
        self.pins: list[object] = []
        self.level = -1
        self.tracked = True
        self._functorch = inside_functorch()
        own: list[Module] = []
        # Plain attributes too: replicas of a module hold their parameters that way.
        self._visit(chain, own)
        for part in reached([value for module in own for value in held_by(module)], own):
            if isinstance(part, Module):
                self.objects.append(ref(part))
                self.facts += (part.training, part.__dict__.get("disabled"))
            else:
                self._add(part)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self._has_same_objects(other) and self.facts == other.facts

    __hash__ = None  # type: ignore[assignment]  # compared, never looked up

    def compare(self, chain: Module) -> State:
        """Return what has become of the state of a chain, which was taken before."""
        now = Snapshot(chain)
        if not self._has_same_objects(now):
            return State.OTHER
        return State.SAME if self.facts == now.facts else State.WRITTEN

    def _has_same_objects(self, other: Snapshot) -> bool:
        return len(self.objects) == len(other.objects) and all(
            map(operator.is_, self.objects, other.objects)
        )

    def _visit(self, module: Module, own: list[Module]) -> None:
        own.append(module)
        self.facts += (module.training, module.__dict__.get("disabled"))
        for store in (module._parameters, module._buffers):
            for value in store.values():
                if value is not None:
                    self._add(value)
        if not module.__dict__.get("is_tensor", True):
            names = [f"original{i}" for i in range(module.ntensors)]  # type: ignore[arg-type]
            self.objects += [module.__dict__.get(name) for name in names]  # opaque originals
        # Past the attribute, for which a tracer gives proxies, other ones each time.
        for name, child in module.__dict__["_modules"].items():
            if child is not None:
                self.objects.append(ref(child))
                self.facts.append(name)
                self._visit(child, own)

    def _add(self, tensor: Tensor) -> None:
        shard = shard_behind(tensor)
        if shard is not None:
            self._add(shard)
        version = version_of(tensor)
        storage, address = storage_identity(tensor)
        self.objects.append(tensor)
        self.pins.append(storage)
        self.tracked = self.tracked and version is not None
        self.facts += (version, address, tensor.requires_grad, tensor.dtype, tensor.shape)
        if storage is not None and tensor.layout is torch.strided:
            self.facts += (tensor.stride(), tensor.storage_offset())
        if self._functorch:
            self.level = max(self.level, functorch_level(tensor))
        if type(tensor) not in _PLAIN and is_wrapper_subclass(tensor):
            # The outer tensor does not see a write to an inner one.
            for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                inner = getattr(tensor, name)
                if isinstance(inner, Tensor):
                    self._add(inner)
