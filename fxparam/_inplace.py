"""Proxies that record operators in place: ``u += 1`` is a node that writes ``u``, as in eager code.

torch.fx's own proxies have none, so that Python falls back on ``u = u + 1``, which writes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute

from fxparam.graph.nodes import value_of

__all__ = ["Recorded", "keep_old_numbers", "written_argument"]

_NAMES = ["add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift"]
_NAMES += ["sub", "truediv", "xor"]
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__i{name}__": getattr(operator, f"i{name}") for name in _NAMES
}


class _InPlace:
    """Operators in place, for a class of proxies."""

    tracer: Any

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: _InPlace, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name, _function in _OPERATORS.items():
    setattr(_InPlace, _name, _recording(_function))


class Recorded(_InPlace, Proxy):
    """A proxy whose operators in place are recorded, and those of its attributes (``x.mT``)."""

    def __getattr__(self, name: str) -> Attribute:
        return _RecordedAttribute(self, name)


class _RecordedAttribute(_InPlace, Attribute):
    pass


def written_argument(node: Node) -> Node | None:
    """The argument that a call writes in place and returns, by torch's conventions."""
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and not name.startswith("_") and not name.endswith("__")
    if not (in_place or name in _OPERATORS or node.target in _OPERATORS.values()):
        writes = node.target is operator.setitem or name == "__setitem__"
        if not (writes or node.kwargs.get("inplace") is True):
            return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, Node) else None


def keep_old_numbers(graph: Graph) -> None:
    """Let ``n += 1`` leave another name for the number ``n`` alone.

    torch.fx generates ``n += 1; iadd = n``, after which what is no tensor has the new value under
    its old name too. Where it is not known for a tensor and read again, it gets a second name.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in order:
        if node.op != "call_function" or node.target not in _OPERATORS.values():
            continue
        old = node.args[0]
        if not isinstance(old, Node) or isinstance(value_of(old), torch.Tensor):
            continue
        if any(order[user] > order[node] for user in old.users):
            with graph.inserting_before(node):
                alias = graph.call_function(operator.getitem, ((old,), 0))
            alias.meta = dict(old.meta)
            node.args = (alias, *node.args[1:])
