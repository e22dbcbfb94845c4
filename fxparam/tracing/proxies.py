"""Proxies that record operators in place, and proxies of tensors whose metadata are known.

``u += 1`` is a node that writes ``u``, as in eager code. torch.fx's own proxies have no operators
in place, so that Python falls back on ``u = u + 1``, which writes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute

from fxparam._torch.fx import IN_PLACE_OPERATORS
from fxparam.graph.analysis.nodes import value_of
from fxparam.tracing.propagation import is_constant

__all__ = ["Known", "Recorded", "keep_old_numbers"]


class _InPlace:
    """Operators in place, for a class of proxies."""

    tracer: Any

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: _InPlace, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name, _function in IN_PLACE_OPERATORS.items():
    setattr(_InPlace, _name, _recording(_function))


class Recorded(_InPlace, Proxy):
    """A proxy whose operators in place are recorded, and those of its attributes (``x.mT``)."""

    def __getattr__(self, name: str) -> Attribute:
        return _RecordedAttribute(self, name)


class _RecordedAttribute(_InPlace, Attribute):
    pass


class Known(Recorded):
    """A proxy that answers what depends on the metadata of its tensor alone."""

    @property
    def _value(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            found = getattr(self._value, name, None)
            if isinstance(found, torch.Size) or (not callable(found) and is_constant(found)):
                return found
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        item: Callable[[int], Any] = self.__getitem__
        return iter([item(i) for i in range(len(self._value))])


def keep_old_numbers(graph: Graph) -> None:
    """Let ``n += 1`` leave another name for the number ``n`` alone.

    torch.fx generates ``n += 1; iadd = n``, after which what is no tensor has the new value under
    its old name too. Where it is not known for a tensor and read again, it gets a second name.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in order:
        if node.op != "call_function" or node.target not in IN_PLACE_OPERATORS.values():
            continue
        old = node.args[0]
        if not isinstance(old, Node) or isinstance(value_of(old), torch.Tensor):
            continue
        if any(order[user] > order[node] for user in old.users):
            with graph.inserting_before(node):
                alias = graph.call_function(operator.getitem, ((old,), 0))
            alias.meta = dict(old.meta)
            node.args = (alias, *node.args[1:])
