"""Switches of the grad mode as nodes of a graph.

``torch.no_grad()`` puts back, when it is left, the mode that was in force when it was entered. A
graph is traced in one mode and may be run in another, so that the mode it is entered with is asked
for at its start. Inside another context what is put back is the mode of that one.

    with torch.no_grad():            entered = torch.is_grad_enabled()
        y = f(x)              ->     torch._C._set_grad_enabled(False);  y = f(x)
                                     torch._C._set_grad_enabled(entered)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from fxparam._torch.names import grad_mode_namespace, set_grad_enabled

__all__ = ["record_grad_mode", "replaced", "switch_grad_mode"]

_is_grad_enabled = torch.is_grad_enabled


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of ``owner`` another value in the block."""
    missing = object()
    own = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _entered_with(graph: Graph) -> Node:
    """Return the node that asks for the grad mode the graph is entered with."""
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    if first is None:
        return graph.call_function(_is_grad_enabled)
    if first.target is _is_grad_enabled:
        return first  # type: ignore[no-any-return]
    with graph.inserting_before(first):
        return graph.call_function(_is_grad_enabled)


class _Callers(int):
    """The answer to ``torch.is_grad_enabled()`` where that is the mode a graph is entered with."""


@contextmanager
def record_grad_mode(graph: Callable[[], Graph], paused: Callable[[], bool]) -> Iterator[None]:
    """Record switches of the grad mode in the block as nodes of a graph; they happen as well.

    Args:
        graph: returns the graph being traced.
        paused: says whether the tracer runs operations of its own, which are not recorded.
    """
    before = _is_grad_enabled()
    is_callers = True

    def ask() -> int:
        enabled = _is_grad_enabled()
        return _Callers(enabled) if is_callers and not paused() else enabled

    def switch(mode: Any) -> None:
        nonlocal is_callers
        if not paused():
            is_callers = isinstance(mode, _Callers)
            argument = _entered_with(graph()) if is_callers else mode
            graph().call_function(set_grad_enabled, (argument,))
        set_grad_enabled(bool(mode) if isinstance(mode, _Callers) else mode)

    # Not by a mode for torch functions, which is told of neither the question nor a _Callers.
    with (
        replaced(torch, "is_grad_enabled", ask),
        replaced(grad_mode_namespace, "_set_grad_enabled", switch),
    ):
        try:
            yield
        finally:
            set_grad_enabled(before)


# Stands for the grad mode of whoever calls a graph.
_CALLERS = object()


def switch_grad_mode(graph: Graph, opposite: Graph | None, enabled: bool) -> None:
    """Replace the switches of a graph of Dynamo's by ones that are right in both grad modes.

    Dynamo records only switches that change something in the mode it captures in. A node that runs
    under a mode of the model's own has that mode in both captures; one that runs under its caller's
    has in each the mode of the capture.

    Args:
        graph: a capture of a model; its switches are replaced.
        opposite: the capture in the other mode; None if the model cannot be captured there.
        enabled: the mode that ``graph`` was captured in.
    """
    ours, modes = _modes(graph, enabled)
    theirs, others = _modes(opposite, not enabled) if opposite is not None else ([], [])
    # A model that asks for the mode may do other things in another.
    if [_what(n) for n in ours] != [_what(n) for n in theirs]:
        others = [not enabled] * len(modes)
    pairs = zip(modes, others, strict=True)
    modes = [_CALLERS if (a, b) == (enabled, not enabled) else a for a, b in pairs]
    for switch in graph.find_nodes(op="call_function", target=set_grad_enabled):
        graph.erase_node(switch)
    current: object = _CALLERS
    for node, mode in zip(ours, modes, strict=True):
        if mode is not current and node.op not in ("placeholder", "get_attr"):
            current = mode
            argument: Any = _entered_with(graph) if mode is _CALLERS else mode
            with graph.inserting_before(node):
                graph.call_function(set_grad_enabled, (argument,))


def _modes(graph: Graph, mode: bool) -> tuple[list[Node], list[object]]:
    """Return the nodes of a graph without its switches, and the mode that each runs under."""
    nodes: list[Node] = []
    modes: list[object] = []
    for node in graph.nodes:
        if node.target is set_grad_enabled:
            mode = node.args[0]
        else:
            nodes.append(node)
            modes.append(mode)
    return nodes, modes


def _what(node: Node) -> object:
    """Return the kind of a node and the function it calls, to compare two captures."""
    return (node.op, node.target if node.op.startswith("call") else None)
