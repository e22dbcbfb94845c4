"""Buffers that traced code rebinds (``self.h = f(self.h)``), written by the graph at its end.

While a model is traced its modules hold what its code binds, so that Python's own rules decide what
a later read gives; afterwards they hold what they held before. The last value of a buffer is
written to it at the end of the graph, which reads the old value from a copy made at the start:

    old = self.h                              h = self.h; old = h.clone()
    self.h = torch.tanh(self.cell(old))  ->   tanh = torch.tanh(...)
    return old                                h.detach_(); h.copy_(tanh)
                                              return old
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import TraceError
from torch.nn import Module

from fxparam._torch.fx import written_argument
from fxparam._torch.names import assert_tensor_metadata
from fxparam._torch.tensors import geometry, is_view_of_another, share_memory
from fxparam.eager.rollback import Attributes
from fxparam.graph.analysis.nodes import meta_with, value_of

__all__ = ["CannotRebindError", "State", "write_rebound"]


class CannotRebindError(TraceError):
    """Raised for a model that leaves in a buffer something that a graph cannot write to it."""

    def __init__(self, name: str, found: str) -> None:
        super().__init__(
            f"the model binds another tensor to its buffer {name!r}, which a graph writes to the "
            f"buffer.\nrequired: {_REQUIRED}\nfound: {found}\n"
            "Write to the buffer in place, or keep that tensor out of the model: take and return "
            "it."
        )


_REQUIRED = "a tensor with the shape and dtype of the buffer, which shares no memory with another"


class State:
    """The tensors and attributes of a model before it is traced, and what tracing rebinds.

    Args:
        root: the model; anything else has no state.
    """

    def __init__(self, root: Any) -> None:
        modules = dict(root.named_modules()) if isinstance(root, Module) else {}
        self._root = root
        self._paths = {module: f"{path}." if path else "" for path, module in modules.items()}
        self._buffers = {module: dict(module._buffers) for module in self._paths}
        held = (value for module in self._paths for value in vars(module).values())
        #: Tensors in attributes that are neither parameters nor buffers.
        self.plain_tensors = [value for value in held if isinstance(value, torch.Tensor)]
        self._attributes = Attributes(self._paths)

    def __contains__(self, module: object) -> bool:
        return module in self._paths

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers as they were, a tied one under each of its names."""
        found: dict[str, torch.Tensor] = {}
        for module, path in self._paths.items():
            held = {**module._parameters, **self._buffers[module]}
            found |= {path + name: value for name, value in held.items() if value is not None}
        return found

    def rebound(self) -> dict[str, Any]:
        """Return, by their names, the values of buffers that were bound anew; nodes for proxies."""
        missing = object()
        return {
            path + name: now.node if isinstance(now, Proxy) else now
            for module, path in self._paths.items()
            for name, before in self._buffers[module].items()
            if (now := module._buffers.get(name, missing)) is not before
        }

    def restore(self) -> None:
        """Put the buffers and all other attributes back as they were."""
        self._attributes.restore()


def write_rebound(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    describe: Callable[[Node], None],
) -> None:
    """Let a graph write to buffers, at its end, the values that traced code has bound to them.

    Args:
        graph: a graph that reads the model's tensors by their names.
        tensors: those, under each of their names.
        values: by the names of buffers, the nodes of what is left in them.
        describe: gives a new node its metadata, as far as they are known.

    Raises:
        CannotRebindError: a buffer cannot be made to hold its value; the graph is as it was.
    """
    reads: dict[int, list[Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        if str(node.target) in tensors:
            reads.setdefault(id(tensors[str(node.target)]), []).append(node)
    written: dict[int, str] = {}
    for name, value in values.items():
        if name not in tensors or not isinstance(value, Node):
            raise CannotRebindError(name, "a buffer that holds None, or is bound to no tensor")
        buffer = tensors[name]
        if not any(_is_same(value, read) for read in reads.get(id(buffer), [])):
            written[id(buffer)] = name
    for name in written.values():
        kept = [n for number, nodes in reads.items() if number not in written for n in nodes]
        _check(name, tensors, values, kept)
    copies: dict[Node, Node] = {}
    buffers = {n: _read_a_copy(graph, n, reads.get(i, []), copies) for i, n in written.items()}
    for node in (*buffers.values(), *copies.values()):
        describe(node)
    for name, read in buffers.items():
        _write(graph, tensors[name], read, copies.get(values[name], values[name]))


def _is_same(value: Node, read: Node) -> bool:
    """Check whether a value is the tensor that was read, be it written in place.

    As after ``self.u += 1``, which binds the buffer to itself.
    """
    node: Node | None = value
    while node is not None:
        if node is read:
            return True
        node = written_argument(node)
    ours, theirs = value_of(value), value_of(read)
    return share_memory(ours, theirs) and geometry(ours) == geometry(theirs)


def _check(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    kept: Sequence[Node],
) -> None:
    """Raise CannotRebindError if writing a value to a buffer is not the same as binding it.

    Args:
        name: the name of the buffer.
        tensors: the model's tensors by their names.
        values: what is left in buffers, by their names.
        kept: reads of tensors that are not bound anew.
    """
    buffer, value = tensors[name], values[name]
    known = value_of(value)
    if isinstance(known, torch.Tensor) and not _may_fit(known, buffer):
        found = f"{tuple(known.shape)}, {known.dtype}, for {tuple(buffer.shape)}, {buffer.dtype}"
        raise CannotRebindError(name, found)
    for other, tensor in tensors.items():
        tied = tensor is buffer and values.get(other) is value
        if share_memory(buffer, tensor) and not tied and other != name:
            raise CannotRebindError(name, f"memory that {name!r} and {other!r} share")
    for read in kept:
        if _is_same(value, read) or share_memory(known, value_of(read)):
            raise CannotRebindError(name, f"the memory of {str(read.target)!r}")


def _may_fit(value: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Check whether dtypes and shapes are equal, as far as they are known."""
    if value.dtype != buffer.dtype or value.dim() != buffer.dim():
        return False
    sizes = zip(value.shape, buffer.shape, strict=True)
    return all(isinstance(a, torch.SymInt) or a == b for a, b in sizes)


def _read_a_copy(graph: Graph, name: str, reads: list[Node], copies: dict[Node, Node]) -> Node:
    """Read a buffer once, at the start, and give every reader a copy of its value.

    A copy that is returned or saved for backward keeps the old value when the graph writes the new.
    """
    start = next(n for n in graph.nodes if n.op != "placeholder")
    if not reads:
        with graph.inserting_before(start):
            # Graph.get_attr() warns that no module has the name: the graph has no owner yet.
            return graph.create_node("get_attr", name)
    read = reads[0]
    if read is not start:
        start.prepend(read)
    with graph.inserting_after(read):
        copy = graph.call_method("clone", (read,))
    for each in reads:
        each.replace_all_uses_with(copy, lambda user: user is not copy)
        copies[each] = copy
        if each is not read:
            graph.erase_node(each)
    return read


def _write(graph: Graph, buffer: torch.Tensor, read: Node, value: Node) -> None:
    """Write a value to a buffer, detached from its history as a newly bound tensor would be."""
    with graph.inserting_before(graph.output_node()):
        # copy_ would broadcast and cast.
        graph.call_function(
            assert_tensor_metadata, (value, list(buffer.shape)), {"dtype": buffer.dtype}
        )
        if not is_view_of_another(buffer):  # torch detaches no view in place
            # Else the buffer would keep the history of all that was ever written to it.
            graph.call_method("detach_", (read,))
        written = graph.call_method("copy_", (read, value))
    if value_of(read) is not None:
        written.meta = meta_with(read, value_of(read))
