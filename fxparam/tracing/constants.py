"""Constants of a graph: tensors that traced code makes of neither inputs nor parameters.

Without example inputs, an operation on tensors that depend neither on the inputs nor on the model's
parameters runs while tracing, and the graph holds its result, the same in each call. So it must not
draw random numbers. And nothing may be written to such a tensor: the next call would find it
written, and operations that ran on it while tracing would miss what the graph writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch.fx import Node

from fxparam._torch.fx import written_argument
from fxparam._torch.names import TorchDispatchMode, builtin_name, schema_of, schemas_of
from fxparam._torch.tensors import functorch_level, geometry, storage_identity, storage_of
from fxparam.graph.analysis.nodes import tensors_in

__all__ = ["Constants", "shown_attribute"]


class Constants(TorchDispatchMode):  # type: ignore[misc]
    """Watches the operations that run while a model is traced, and merges equal constants.

    As a mode around the tracing it raises NotImplementedError for an operation that eager code
    would repeat in each call and the graph would not: one that draws random numbers, or writes to a
    constant or to a tensor of the model.

    Args:
        tensors: the tensors of the model.
        paused: says whether the tracer runs operations of its own, which are let through.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], paused: Callable[[], bool]) -> None:
        super().__init__()
        self._paused = paused
        self._bits: dict[Hashable, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._kept: dict[object, object] = {}  # storages by their numbers, which they keep so
        for tensor in tensors:
            self._keep(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._paused():
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise NotImplementedError(f"{func} draws random numbers once, while tracing")
            for i, argument in enumerate(schema_of(func).arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[i] if i < len(args) else kwargs.get(argument.name)
                    if any(storage_of(t) in self._kept for t in tensors_in(value)):
                        raise NotImplementedError(f"{func} writes once, while tracing")
        return func(*args, **kwargs)

    def first_equal(self, constant: torch.Tensor) -> torch.Tensor:
        """Return the first constant with the same bits and geometry; itself if there is none.

        Equal evaluations then read the same constants, and can be shared.

        Raises:
            NotImplementedError: for a wrapper of ``torch.func``, which means nothing outside of its
                transform.
        """
        if functorch_level(constant) >= 0:
            raise NotImplementedError("a tensor inside a torch.func transform as a constant")
        self._keep(constant)
        if not _is_comparable(constant):
            return constant
        bits = _bits(constant)
        same = self._bits.setdefault(geometry(constant)[:-1], [])  # at any offset
        for other, others in same:
            if torch.equal(bits, others):
                return other
        same.append((constant, bits))
        return constant

    def _keep(self, tensor: torch.Tensor) -> None:
        storage, number = storage_identity(tensor)
        self._kept[number] = storage


def _is_comparable(tensor: torch.Tensor) -> bool:
    """Check whether a tensor is a plain one in the memory of the CPU, without a gradient."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    return not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as bytes, in which 0.0 and -0.0 differ and a NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def shown_attribute(node: Node | None) -> Node | None:
    """Return the ``get_attr`` node whose tensor a node shows, through views that torch declares."""
    while node is not None and node.op != "get_attr":
        written = written_argument(node)
        if written is None and not _is_view(node):
            return None
        first = node.args[0] if node.args else None
        node = written or (first if isinstance(first, Node) else None)
    return node


def _is_view(node: Node) -> bool:
    """Check whether a node calls an op that has an overload whose schema declares a view."""
    if node.target in (getattr, operator.getitem):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    method = node.op == "call_method"
    name = f"aten::{node.target}" if method else builtin_name(node.target)
    schemas = schemas_of(name) if name is not None else ()
    functions = [s for s in schemas if not any(a.is_out for a in s.arguments)]
    return any(r.alias_info is not None for s in functions for r in s.returns)
