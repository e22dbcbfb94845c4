"""The check of rewrites can fail: each promise broken in turn is noticed."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule

from tests.graph.sketch import Sketch, picture


def _graph() -> GraphModule:
    s = Sketch()
    p, x = s.parameter(), s.input()
    return s.returns(s.call(operator.matmul, s.call(torch.exp, p), x))


def _exp(gm: GraphModule) -> torch.fx.Node:
    return next(node for node in gm.graph.nodes if node.op == "call_function")


def _another_value(gm: GraphModule) -> None:
    _exp(gm).target = torch.sin


def _another_gradient(gm: GraphModule) -> None:
    node = _exp(gm)
    if "detach" in (user.target for user in node.users):
        return
    with gm.graph.inserting_after(node):
        detached = gm.graph.call_method("detach", (node,))
    node.replace_all_uses_with(detached, lambda user: user is not detached)


def _forgets_metadata(gm: GraphModule) -> None:
    _exp(gm).meta["example_value"] = torch.empty(3, 3)


def _goes_on(gm: GraphModule) -> None:
    node = _exp(gm)
    with gm.graph.inserting_after(node):
        gm.graph.call_method("neg", (node,))


def _leaves_an_invalid_graph(gm: GraphModule) -> None:
    node = _exp(gm)
    next(iter(node.users)).append(node)


@pytest.mark.parametrize(
    ("rewrite", "error"),
    [
        (_another_value, AssertionError),
        (_another_gradient, AssertionError),
        (_forgets_metadata, AssertionError),
        (_goes_on, AssertionError),
        (_leaves_an_invalid_graph, RuntimeError),
    ],
)
def test_a_broken_promise_is_noticed(
    rewrite: Callable[[GraphModule], None], error: type[Exception]
) -> None:
    with pytest.raises(error):
        picture(_graph(), rewrite)


def test_another_number_of_calls_is_noticed() -> None:
    picture(_graph(), lambda gm: None, exp=(1, 1), sin=(0, 0))
    with pytest.raises(AssertionError):
        picture(_graph(), lambda gm: None, exp=(1, 0))
