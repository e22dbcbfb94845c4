"""Give a read in traced code the value of an earlier evaluation, so that Dynamo traces it once.

Tracing the evaluation is most of what an access costs to compile. Marks let the backend take the
repetitions out (``graph/passes/share_regions.py``), after Dynamo has traced them all. Here a later
read gets the first one's variable, where that can be shown to be right while the code is traced:
no object from before was changed, no tensor that the evaluation read was written, and its value was
not. Whatever cannot be shown is evaluated again, and left to the marks.

The functions here run while Dynamo traces and give it constants. A value is handed over in a local
of the code that reads, since a variable of Dynamo's is no constant, and an attribute that traced
code assigns would stay assigned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxparam import marks
from fxparam._torch.dynamo import (
    assign_local_of_traced_code,
    latest_node,
    local_module_of_traced_code,
    local_of_traced_code,
    trace_marks,
    trace_memory,
    trace_number,
    traces_function_modes,
)
from fxparam._torch.fx import (
    is_erased,
    is_named_in_place,
    may_write_unseen,
    op_name,
    written_argument,
)
from fxparam._torch.names import inside_functorch
from fxparam._torch.side_effects import node_of_variable
from fxparam._torch.tensors import storage_of, version_of
from fxparam.eager.classes import chain_of
from fxparam.scopes.modes import ambient_mark
from fxparam.scopes.under_dynamo import constant, present_changes

__all__ = ["begin", "hold", "lend"]

_Watched = dict[Node, tuple[object, int | None]]


@dataclass
class _Held:
    """The value of an evaluation.

    Attributes:
        key: the region, and the modes that it was read under. (A training mode is an attribute,
            and a change is noticed as that of any other.)
        variable: what stands for the value in Dynamo.
        node: the node of the value.
        watched: the nodes whose tensors must not be written, with their storages and versions:
            those that the evaluation read, the value, and whatever shares memory with these.
        seen: the node up to which the graph was searched for writes.
    """

    key: tuple[str, str]
    variable: Any
    node: Node
    watched: _Watched
    seen: Node


@dataclass
class _Trace:
    """The values of one trace.

    Attributes:
        held: by the ``id()`` of the parametrization list.
        watched: by the node of a value, what must not be written for it to be right.
        begun: the nodes after which evaluations began; None in a body.
    """

    held: dict[int, _Held] = field(default_factory=dict)
    watched: dict[Node, _Watched] = field(default_factory=dict)
    begun: list[Node | None] = field(default_factory=list)


def lend(name: str) -> bool:
    """Bind the local ``value`` of the traced getter to the value of an earlier evaluation.

    Args:
        name: the name of the tensor; the module is the getter's local ``self``.

    Returns:
        Whether there is one, and it is right.
    """
    trace = trace_memory(_Trace)
    module = local_module_of_traced_code("self") if trace.held else None
    chain = None if module is None else chain_of(module, name)
    held = trace.held.get(id(chain))
    if held is None or held.key != (_region(), ambient_mark()) or not _may_hold():
        return False
    if not _is_right(held):
        del trace.held[id(chain)]
        return False
    assign_local_of_traced_code("value", held.variable)
    marks.count_read(held.node, trace_number())
    return True


@constant
def begin(chain: int) -> int:
    """Note that an evaluation begins, and return its number; a region keeps one value, the last.

    Args:
        chain: the identity of a ``ParametrizationList``.
    """
    trace = trace_memory(_Trace)
    trace.held.pop(chain, None)
    trace.begun.append(latest_node())
    return len(trace.begun) - 1


@constant
def hold(chain: int, begun: int) -> None:
    """Hold the value of an evaluation that has ended, which the traced local ``value`` has.

    Args:
        chain: the identity of a ``ParametrizationList``.
        begun: the number from :func:`begin`.
    """
    trace = trace_memory(_Trace)
    first, last = trace.begun[begun], latest_node()
    if first is None or last is None or is_erased(first) or not _may_hold():
        return
    variable = local_of_traced_code("value")
    inside = {node for node in _after(first) if node.op not in ("placeholder", "get_attr")}
    value = node_of_variable(variable)
    if value is None or value not in inside:  # an original itself
        return
    watched: _Watched = {}
    for node in (value, *(n for each in inside for n in each.all_input_nodes if n not in inside)):
        watched |= trace.watched.get(node, {})
        watched[node] = _state(node)
    if any(None in state for state in watched.values()):  # not shown by storages and versions
        return
    # An alias may have a version of its own.
    watched |= _on_the_same_memory(last.graph.nodes, watched)
    trace.watched[value] = watched
    trace.held[chain] = _Held((_region(), ambient_mark()), variable, value, watched, last)


def _region() -> str:
    """Return the mark of the region that the traced code is in; there may be one around it."""
    mark: str = trace_marks().get(marks.REGION, marks.region_around(trace_number()))
    return mark


def _may_hold() -> bool:
    """Check whether nothing was changed that the nodes of the graph do not show."""
    return not (
        latest_node() is None or inside_functorch() or traces_function_modes() or present_changes()
    )


def _is_right(held: _Held) -> bool:
    """Check whether nothing wrote what a value was computed from, nor the value."""
    if is_erased(held.seen):
        return False
    new = (n for n in held.node.graph.find_nodes(op="placeholder") if n not in held.watched)
    if _on_the_same_memory(new, held.watched):
        return False
    for node in _after(held.seen):
        if may_write_unseen(node) or _on_the_same_memory(_written(node), held.watched):
            return False
        held.seen = node
    return all(_state(node) == state for node, state in held.watched.items())


def _on_the_same_memory(nodes: Iterable[Node], watched: _Watched) -> _Watched:
    """Return those of some nodes whose tensors are in the memory of watched ones, as they are."""
    storages = {storage for storage, _ in watched.values()}
    states = ((node, _state(node)) for node in nodes)
    return {node: state for node, state in states if state[0] in storages}


def _after(node: Node) -> Iterator[Node]:
    """Yield the nodes that were traced after one."""
    while node.next.op != "root":
        node = node.next
        yield node


def _state(node: Node) -> tuple[object, int | None]:
    """Return the storage and the version of a node's fake tensor; no version for what is none."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return None, None
    return storage_of(value), version_of(value)


def _written(node: Node) -> Iterable[Node]:
    """Return the nodes whose tensors a node may write."""
    written = written_argument(node)
    if written is not None:
        return (written,)
    name = op_name(node)
    # Running statistics are written, and no version counts that.
    by_name = is_named_in_place(name) or "batch_norm" in name or "instance_norm" in name
    return node.all_input_nodes if by_name or "out" in node.kwargs else ()
