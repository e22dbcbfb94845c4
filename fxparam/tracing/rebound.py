"""Buffers that traced code rebinds (``self.h = f(self.h)``), written by the graph at its end.

While a model is traced its modules hold what its code binds, so that Python's own rules decide what
a later read gives; afterwards they hold what they held before. What they held at the end, the graph
writes to the buffer, whose old value it reads from a copy made at the start:

    old = self.h                              h = self.h; old = h.clone()
    self.h = torch.tanh(self.cell(old))  ->   tanh = torch.tanh(...)
    return old                                h.detach_(); h.copy_(tanh)
                                              return old
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import TraceError
from torch.nn import Module

from fxparam._torch.fx import written_argument
from fxparam._torch.names import assert_tensor_metadata, tree_flatten
from fxparam._torch.tensors import is_view_of_another, storage_identity
from fxparam.graph.analysis.nodes import meta_with, value_of

__all__ = ["CannotRebindError", "State", "write_rebound"]


class CannotRebindError(TraceError):
    """A model leaves in a buffer what a graph cannot write to it."""

    def __init__(self, name: str, found: str) -> None:
        super().__init__(
            f"the model binds another tensor to its buffer {name!r}, which a graph writes to the "
            f"buffer.\nrequired: {_REQUIRED}\nfound: {found}\n"
            "Write to the buffer in place, or keep that tensor out of the model: take and return "
            "it."
        )


_REQUIRED = "a tensor with the shape and dtype of the buffer, which shares no memory with another"


class State:
    """What the modules of a model hold before they are traced.

    Args:
        root: the model; anything else has no state.
    """

    def __init__(self, root: Any) -> None:
        modules = dict(root.named_modules()) if isinstance(root, Module) else {}
        self._root = root
        self._paths = {module: f"{path}." if path else "" for path, module in modules.items()}
        self._buffers = {module: dict(module._buffers) for module in self._paths}
        self._attributes = {module: dict(vars(module)) for module in self._paths}

    def __contains__(self, module: object) -> bool:
        return module in self._paths

    @property
    def plain_tensors(self) -> list[torch.Tensor]:
        """Tensors in attributes that are neither parameters nor buffers."""
        held = (value for attributes in self._attributes.values() for value in attributes.values())
        return [value for value in held if isinstance(value, torch.Tensor)]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer under each of its names, as it was."""
        found: dict[str, torch.Tensor] = {}
        for module, path in self._paths.items():
            held = {**module._parameters, **self._buffers[module]}
            found |= {path + name: value for name, value in held.items() if value is not None}
        return found

    def rebound(self) -> dict[str, Any]:
        """What is bound to buffers' names now, where that is something else; nodes for proxies."""
        missing = object()
        return {
            path + name: now.node if isinstance(now, Proxy) else now
            for module, path in self._paths.items()
            for name, before in self._buffers[module].items()
            if (now := module._buffers.get(name, missing)) is not before
        }

    def restore(self, keep: Collection[str] = ()) -> None:
        """Put the buffers back, and the attributes that hold other tensors, but for some names."""
        for module, path in self._paths.items():
            module._buffers.clear()
            module._buffers.update(self._buffers[module])
            before, now = self._attributes[module], vars(module)
            for name in [n for n, v in now.items() if v is not before.get(n) and _is_traced(v)]:
                if name in before:
                    now[name] = before[name]
                elif path + name not in keep:
                    del now[name]


def _is_traced(value: Any) -> bool:
    return any(isinstance(leaf, (torch.Tensor, Proxy)) for leaf in tree_flatten(value)[0])


def write_rebound(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    describe: Callable[[Node], None],
) -> None:
    """Write, at the end of a graph, what it computes for buffers to them.

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
    """Check whether a value is what was read, written in place: ``self.u += 1``, ``out=self.u``."""
    node: Node | None = value
    while node is not None:
        if node is read:
            return True
        node = written_argument(node)
    ours, theirs = value_of(value), value_of(read)
    return _share_memory(ours, theirs) and _place(ours) == _place(theirs)


def _place(tensor: torch.Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _share_memory(one: Any, other: Any) -> bool:
    memory = storage_identity(one)[1]
    return memory is not None and memory == storage_identity(other)[1]


def _check(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    kept: Sequence[Node],
) -> None:
    buffer, value = tensors[name], values[name]
    known = value_of(value)
    if isinstance(known, torch.Tensor) and not _may_fit(known, buffer):
        found = f"{tuple(known.shape)}, {known.dtype}, for {tuple(buffer.shape)}, {buffer.dtype}"
        raise CannotRebindError(name, found)
    for other, tensor in tensors.items():
        tied = tensor is buffer and values.get(other) is value
        if _share_memory(buffer, tensor) and not tied and other != name:
            raise CannotRebindError(name, f"memory that {name!r} and {other!r} share")
    for read in kept:
        if _is_same(value, read) or _share_memory(known, value_of(read)):
            raise CannotRebindError(name, f"the memory of {str(read.target)!r}")


def _may_fit(value: torch.Tensor, buffer: torch.Tensor) -> bool:
    if value.dtype != buffer.dtype or value.dim() != buffer.dim():
        return False
    sizes = zip(value.shape, buffer.shape, strict=True)
    return all(isinstance(a, torch.SymInt) or a == b for a, b in sizes)


def _read_a_copy(graph: Graph, name: str, reads: list[Node], copies: dict[Node, Node]) -> Node:
    """Read a buffer once, at the start, and give every reader a copy of its value.

    What was returned or saved for backward has the old value when the graph has written the new.
    """
    start = next(n for n in graph.nodes if n.op != "placeholder")
    if not reads:
        with graph.inserting_before(start):
            return graph.create_node("get_attr", name)  # get_attr() warns: no module has it yet
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
    """Bind a buffer to a value, as far as anyone can see who reads it later."""
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
