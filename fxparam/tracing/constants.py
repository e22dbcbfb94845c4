"""Tensors that traced code makes of nothing: constants of the graph, and when they may be.

Without example inputs, an operation on tensors that depend neither on the inputs nor on the model's
parameters runs while tracing, and the graph has its result, the same in each call. So it must not
draw random numbers, and nothing may be written to such a tensor: the next call would find it
written, and what is computed from it while tracing does not see what the graph writes.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch.fx import Node

from fxparam._torch.fx import written_argument
from fxparam._torch.names import TorchDispatchMode, builtin_name, schemas_of
from fxparam._torch.tensors import storage_identity
from fxparam.graph.analysis.nodes import tensors_in

__all__ = ["Constants", "shown_attribute"]


class Constants(TorchDispatchMode):  # type: ignore[misc]
    """While active, refuses what a graph with constants would do otherwise than eager code.

    Args:
        tensors: those of the model.
        paused: whether operations that run are none of the traced code.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], paused: Callable[[], bool]) -> None:
        super().__init__()
        self._paused = paused
        self._by_content: dict[Hashable, torch.Tensor] = {}
        self._kept: dict[object, object] = {}  # storages by their numbers, which are theirs so
        for tensor in tensors:
            self._keep(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._paused():
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise NotImplementedError(f"{func} draws random numbers once, while tracing")
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[i] if i < len(args) else kwargs.get(argument.name)
                    if any(storage_identity(t)[1] in self._kept for t in tensors_in(value)):
                        raise NotImplementedError(f"{func} writes once, while tracing")
        return func(*args, **kwargs)

    def first_equal(self, constant: torch.Tensor) -> torch.Tensor:
        """The first constant with the same content: equal evaluations then have equal ones."""
        self._keep(constant)
        key = _content(constant)
        return constant if key is None else self._by_content.setdefault(key, constant)

    def _keep(self, tensor: torch.Tensor) -> None:
        storage, number = storage_identity(tensor)
        self._kept[number] = storage


def _content(tensor: torch.Tensor) -> Hashable | None:
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.requires_grad:
        return None
    if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return None
    flat = tensor.detach().contiguous()
    digest = hashlib.sha256(ctypes.string_at(flat.data_ptr(), flat.nbytes)).digest()
    return (tensor.dtype, tensor.shape, tensor.stride(), digest)


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
    if node.target in (getattr, operator.getitem):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    method = node.op == "call_method"
    name = f"aten::{node.target}" if method else builtin_name(node.target)
    schemas = schemas_of(name) if name is not None else ()
    functions = [s for s in schemas if not any(a.is_out for a in s.arguments)]
    return any(r.alias_info is not None for s in functions for r in s.returns)
