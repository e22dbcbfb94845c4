"""The pass by itself, for graphs that somebody else captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from fxparam import graph
from fxparam._private import FakeTensorMode, tree_map
from fxparam.graph import HoistResult

__all__ = ["hoist"]


class _FakeRun(Interpreter):
    """Runs a graph on fake tensors and leaves them in the nodes' metadata.

    Not ``FakeTensorProp``, which runs on the real tensors that the graph module holds.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        before = torch.is_grad_enabled()
        try:
            fakes = tree_map(self._fake, args)
            with self._mode:
                return super().run(*fakes)
        finally:
            torch.set_grad_enabled(before)

    def _fake(self, value: Any) -> Any:
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def fetch_attr(self, target: str) -> Any:
        return self._fake(super().fetch_attr(target))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if value is not None:
            n.meta["val"] = value
        return value


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
            first, and what each node does is seen. Without, it is read off the metadata that the
            capture left (``meta["val"]``, ``meta["example_value"]``), and assumed to be the worst
            where there are none.
        grad_enabled: the grad mode in which the graph is called, None if not known.
        max_bytes: a value with more bytes is not shared.

    Returns:
        The same graph module, a report of what was shared and kept, whether anything changed.

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
    if example_inputs is not None:
        _FakeRun(gm).run(*example_inputs)
    return graph.hoist(gm, grad_enabled=grad_enabled, max_bytes=max_bytes)
