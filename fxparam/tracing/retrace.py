"""``Retracer``: traces the code of a graph when it is unpickled, and runs none of it.

A tracer of models runs the calls in which no proxy takes part, and keeps their results. In the code
of a graph each call is a node, ``torch.rand(3)`` and switches of the grad mode among them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.nn import Module
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fxparam._torch.names import HigherOrderOperator, set_grad_enabled
from fxparam.tracing.grad_mode import replaced
from fxparam.tracing.propagation import Propagation
from fxparam.tracing.proxies import Recorded, keep_old_numbers

__all__ = ["Retracer"]

_is_grad_enabled = torch.is_grad_enabled
# By their id(), as globals of generated code need not compare with functions.
_ANSWERED_BY_PYTHON = set(map(id, (operator.not_, operator.truth, operator.is_, operator.is_not)))


class Retracer(torch.fx.Tracer):
    """Traces the code that torch.fx generates for a graph."""

    proxy_buffer_attributes = True

    def trace(
        self,
        root: Module | Callable[..., Any],
        concrete_args: dict[str, Any] | None = None,
    ) -> Graph:
        """Return the graph whose code ``root`` has.

        Nodes that depend on parameters alone have their metadata.
        """

        def ask() -> Any:
            return self.create_proxy("call_function", _is_grad_enabled, (), {})

        def call(op: Any, *args: Any, **kwargs: Any) -> Any:
            return self.create_proxy("call_function", op, args, kwargs)

        with ExitStack() as stack:
            # Some run their bodies on the proxies before they dispatch, whatever mode is active
            # (test_pickled_bodies_run_what_they_are_made_of).
            for kind in _kinds(HigherOrderOperator):
                stack.enter_context(replaced(kind, "__call__", call))
            stack.enter_context(replaced(torch, "is_grad_enabled", ask))
            stack.enter_context(_answers_recorded(root, call))
            stack.enter_context(_RecordCalls(self))
            graph = super().trace(root, concrete_args)
        keep_old_numbers(graph)
        _describe(graph, self.root)
        return graph

    def proxy(self, node: Node) -> Proxy:
        """Return a proxy that records operators in place."""
        return Recorded(node, self)


@contextmanager
def _answers_recorded(root: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Record calls of functions that Python answers itself, with True or False, for any object.

    A proxy is never asked, or asked in a way that it must refuse (``test_pickled_answers``). The
    generated code finds each under a global name of its own.

    Args:
        root: a module whose ``forward`` is the code.
        call: records a call of its first argument.
    """
    names = getattr(type(root).forward, "__globals__", {})
    before = {name: value for name, value in names.items() if id(value) in _ANSWERED_BY_PYTHON}
    names.update({name: partial(call, value) for name, value in before.items()})
    try:
        yield
    finally:
        names.update(before)


def _kinds(kind: type) -> Iterator[type]:
    """Yield a class and its subclasses, those that define a ``__call__`` of their own."""
    if "__call__" in vars(kind):
        yield kind
    subclasses: list[type] = kind.__subclasses__()
    for each in subclasses:
        yield from _kinds(each)


class _RecordCalls(TorchFunctionMode):
    """Records the calls of torch's functions as nodes, those without a proxy argument too."""

    def __init__(self, tracer: Retracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_tensor_method_or_property(func):
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _describe(graph: Graph, root: Module) -> None:
    """Give the nodes that depend on parameters alone their metadata, in their grad modes."""
    known, before = Propagation(), _is_grad_enabled()
    try:
        for node in graph.nodes:
            if node.target is set_grad_enabled:
                set_grad_enabled(before if isinstance(node.args[0], Node) else node.args[0])
            else:
                known.describe(node, root)
    finally:
        set_grad_enabled(before)
