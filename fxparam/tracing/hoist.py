"""``hoist``: the hoisting pass by itself, for graphs that somebody else captured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import Parameter

from fxparam._torch.names import FakeTensorMode, inside_functorch, tree_map
from fxparam._torch.tensors import storage_of
from fxparam.eager.describe import check_kind
from fxparam.eager.rollback import attributes_kept
from fxparam.graph import HoistResult
from fxparam.graph.passes.hoist import hoist as hoist_graph

__all__ = ["hoist"]

_WAY_OUT = "fxparam.symbolic_trace makes one; an exported program has one, its graph_module."

_log = logging.getLogger("fxparam")


class _FakeRun(Interpreter):
    """Runs a graph on fake tensors and leaves them in the nodes' metadata.

    Not ``FakeTensorProp``, which runs on the real tensors that the graph module holds. What cannot
    be run on fakes (it reads data, is a function that does not take them) is left out, with all
    that depends on it: those nodes get no metadata, and the passes assume the worst of them.

    Not ``Propagation`` either, whose fakes change with ``t_()`` so that proxies answer as tensors
    do at that moment; the passes need of each node the metadata that it had when it ran.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._unknown: set[Node] = set()
        for node in gm.graph.nodes:
            node.meta.pop("val", None)  # of other fakes

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        before = torch.is_grad_enabled()
        try:
            fakes = tree_map(self._fake, args)
            # Modules are run too, and may keep what they have computed.
            with attributes_kept(self.module), self._mode:
                return super().run(*fakes)
        finally:
            torch.set_grad_enabled(before)

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or getattr(value, "fake_mode", None) is self._mode:
            return value
        return self._mode.from_tensor(value)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module on fakes of its tensors: a fake mode computes with small real ones."""
        module: Any = super().fetch_attr(target)
        held = (*module.named_parameters(), *module.named_buffers())
        return functional_call(module, {n: self._fake(t) for n, t in held}, args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        return self._fake(super().fetch_attr(target))

    def run_node(self, n: Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return self._seen(n)
        if not self._unknown.isdisjoint(n.all_input_nodes):
            self._unknown.add(n)
            return None
        try:
            return self._seen(n)
        except Exception as error:  # whatever fakes cannot do
            _log.info("hoist: not run on fake tensors: %s: %s", n.format_node(), error)
            # It may have changed its arguments' shapes before it raised.
            self._unknown |= {n, *n.all_input_nodes}
            return None

    def _seen(self, node: Node) -> Any:
        value = super().run_node(node)
        if value is not None:
            node.meta["val"] = tree_map(self._as_now, value)
        return value

    def _as_now(self, value: Any) -> Any:
        """Return an alias of a tensor, which keeps its shape when a later node changes it (``t_``).

        Anything else is returned as it is.
        """
        if not isinstance(value, torch.Tensor) or storage_of(value) is None:
            return value
        if inside_functorch():  # where an alias is a wrapper
            return value
        value = self._fake(value)
        if isinstance(value, Parameter):
            return Parameter(value.detach(), requires_grad=value.requires_grad)
        return value.detach().requires_grad_(value.requires_grad)


def hoist(
    gm: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    grad_enabled: bool | None = None,
    max_bytes: float = float("inf"),
) -> HoistResult:
    """Make repeated evaluations in a graph one, where that changes no result.

    Args:
        gm: a graph of any capture: Dynamo's, :func:`fxparam.symbolic_trace`'s, ``make_fx``'s, an
            ``ExportedProgram``'s ``graph_module``; changed in place.
        example_inputs: one for each placeholder. With them, fake tensors are run through the graph
            first, and what each node does is seen; of nodes that read data, and of those that
            depend on them, the worst is assumed. Without, it is read off the metadata that the
            capture left (``meta["val"]``, ``meta["example_value"]``), and assumed to be the worst
            where there are none.
        grad_enabled: the grad mode in which the graph is called, None if not known.
        max_bytes: a value with more bytes is not shared.

    Returns:
        The same graph module, a report of what was shared and kept, whether anything changed.

    Raises:
        TypeError: ``gm`` is no graph module.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.p = torch.nn.Parameter(torch.eye(2))
        ...     def forward(self, x):
        ...         return torch.matrix_exp(self.p) @ (torch.matrix_exp(self.p) @ x)
        >>> gm = torch.fx.symbolic_trace(Twice())
        >>> result = fxparam.hoist(gm, (torch.ones(2),))
        >>> result.modified
        True
        >>> sum(node.target is torch.matrix_exp for node in gm.graph.nodes)
        1
    """
    check_kind("gm", gm, GraphModule, _WAY_OUT)
    if example_inputs is not None:
        _FakeRun(gm).run(*example_inputs)
    return hoist_graph(gm, grad_enabled=grad_enabled, max_bytes=max_bytes)
