"""Switches of the grad mode as nodes of a graph.

``torch.no_grad()`` puts back, when it is left, the mode that was in force when it was entered. A
graph is traced in one mode and may be run in another, so that the mode it is entered with is asked
for at its start.

    with torch.no_grad():            entered = torch.is_grad_enabled()
        y = f(x)              ->     torch._C._set_grad_enabled(False);  y = f(x)
                                     torch._C._set_grad_enabled(entered)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from fxparam._private import set_grad_enabled

__all__ = ["RecordGradMode", "restore_grad_mode"]


def _entered_with(graph: Graph) -> Node:
    """The node that asks for the grad mode the graph is entered with."""
    first: Node | None = None
    for node in graph.nodes:
        if node.target is torch.is_grad_enabled:
            return node  # type: ignore[no-any-return]
        if first is None and node.op != "placeholder":
            first = node
    if first is None:
        return graph.call_function(torch.is_grad_enabled)
    with graph.inserting_before(first):
        return graph.call_function(torch.is_grad_enabled)


def restore_grad_mode(graph: Graph, entered: bool) -> None:
    """Where a captured graph sets the mode in which it was captured, set that of its caller."""
    for node in graph.find_nodes(op="call_function", target=set_grad_enabled):
        if node.args[0] is entered:
            node.args = (_entered_with(graph),)


class RecordGradMode(TorchFunctionMode):
    """While active, a switch of the grad mode is a node of ``graph()`` too.

    Args:
        graph: the graph being traced.
        paused: whether operations that run are none of the traced code.
    """

    def __init__(self, graph: Callable[[], Graph], paused: Callable[[], bool]) -> None:
        super().__init__()
        self._graph, self._paused = graph, paused
        self._entered = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is set_grad_enabled and not self._paused():
            graph = self._graph()
            leaves = args[0] is self._entered and _is_leaving()
            graph.call_function(func, (_entered_with(graph) if leaves else args[0],))
        return func(*args, **(kwargs or {}))


def _is_leaving() -> bool:
    """Whether the mode is set by a context that is left, or by code that was traced before."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        if frame.f_code.co_name == "__exit__":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith("<eval_with_key>")
