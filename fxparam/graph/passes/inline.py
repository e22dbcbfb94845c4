"""A call in a graph gives way to the calls that a function makes.

The function runs on the example values of the arguments, under a mode that sees each function of
torch that it calls. So the graph gets nodes as Dynamo makes them, with example values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from fxparam._torch.names import tree_map
from fxparam.graph.analysis.nodes import meta_with, value_of
from fxparam.marks import within_evaluation

__all__ = ["inline"]


def inline(node: Node, function: Callable[..., Tensor], arguments: Iterable[Any]) -> None:
    """Put what a function computes in the place of a node, which is erased.

    Args:
        node: a call whose value is a fake tensor.
        function: returns a tensor, which a function of torch has made.
        arguments: what it is called with: nodes before ``node`` in its graph, and literals.
    """
    given = [(each, value_of(each) if isinstance(each, Node) else each) for each in arguments]
    nodes = {id(value): each for each, value in given if isinstance(each, Node)}
    values = [value for _, value in given]
    recorder = _Recorder(node, nodes)
    with node.graph.inserting_before(node), value_of(node).fake_mode, torch.enable_grad(), recorder:
        result = function(*values)
    last = nodes[id(result)]
    last.meta = meta_with(node, result)
    node.replace_all_uses_with(last)
    node.graph.erase_node(node)


class _Recorder(TorchFunctionMode):
    """Adds a node for each call that returns a tensor.

    Args:
        node: new nodes are traced where it was.
        nodes: what has been computed, by the identity of the values; gets the new nodes.
    """

    def __init__(self, node: Node, nodes: dict[int, Node]) -> None:
        super().__init__()
        self._node, self._nodes = node, nodes
        self._alive: list[Tensor] = []  # an identity is only that of a value while that lives

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._alive.append(result)
            given = tree_map(self._known, args), tree_map(self._known, kwargs or {})
            new = self._node.graph.create_node(*_called(func), *given)
            new.meta = within_evaluation(meta_with(self._node, result))
            self._nodes[id(result)] = new
        return result

    def _known(self, value: Any) -> Any:
        return self._nodes[id(value)] if isinstance(value, Tensor) else value


def _called(function: Any) -> tuple[str, Any]:
    """Return the kind and the target of a node that calls a function, or a method of tensors."""
    name = getattr(function, "__name__", "")
    if getattr(Tensor, name, None) is function:
        return "call_method", name
    return "call_function", function
