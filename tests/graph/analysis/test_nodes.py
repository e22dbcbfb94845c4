"""What a node says of itself: values, memory, and where it was traced."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import ParametrizationList

from fxparam.graph.analysis.nodes import (
    ancestors,
    attribute_of,
    body_of,
    is_view,
    meta_with,
    modules_around,
    owner,
    tensors_in,
    value_of,
)
from tests.graph.sketch import Sketch


def test_values_of_dynamo_and_of_export() -> None:
    s = Sketch()
    x = s.input()
    value = x.meta["example_value"]
    assert value_of(x) is value
    exported, unknown = s.graph.placeholder("y"), s.graph.placeholder("z")
    exported.meta["val"] = value
    assert value_of(exported) is value and value_of(unknown) is None
    for node, key in ((x, "example_value"), (exported, "val")):
        node.meta["kept"] = "kept"
        changed = meta_with(node, 3)
        assert (changed[key], changed["kept"]) == (3, "kept") and value_of(node) is value


def test_tensors_in_order() -> None:
    a, b, c = (torch.ones(i) for i in (1, 2, 3))
    assert [t.numel() for t in tensors_in({"x": [a, (b, 2)], "y": c})] == [1, 2, 3]
    assert tensors_in((1, None)) == []


def test_ancestors_as_far_as_asked() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    w = s.call(torch.exp, p)
    y = s.call(operator.matmul, w, x)
    assert ancestors([y]) == {y, w, x, p}
    assert ancestors([y], lambda node: node is not w) == {y, x}
    assert ancestors([w]) == {w, p}


@pytest.mark.parametrize(
    ("target", "args", "view"),
    [
        ("t", (), True),
        ("view", (9,), True),
        ("detach", (), True),
        (operator.getitem, (0,), True),
        ("exp", (), False),
        ("clone", (), False),
        ("sum", (), False),
    ],
)
def test_views(target: Any, args: Any, view: bool) -> None:
    s = Sketch()
    assert is_view(s.call(target, s.input(), *args)) is view


def test_what_the_module_holds() -> None:
    s = Sketch()
    b = Sketch(s)
    inner = b.returns(b.input())
    body, tensor, x = s.attribute("body", inner), s.attribute("held", torch.ones(2)), s.input()
    gm = s.returns(x)
    assert body_of(gm, body) is inner and isinstance(inner, GraphModule)
    assert body_of(gm, tensor) is None and body_of(gm, x) is None
    assert attribute_of(gm, tensor) is gm.held


class ParametrizedParametrizationList(ParametrizationList):
    """As ``register_parametrization`` makes it for a list with a parametrized original."""


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].cell.parametrizations.weight", "cell.weight"),
        ("L['self'].parametrizations.weight", "weight"),
        ("cell.parametrizations.weight", "cell.weight"),
        ("_export_root.cell.parametrizations.weight", "cell.weight"),
        ("L['f'].__closure__[0].cell_contents.cell.parametrizations.weight", "cell.weight"),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        ParametrizationList,
        ParametrizedParametrizationList,
        "torch.nn.utils.parametrize.ParametrizationList",
        "torch.nn.utils.parametrize.ParametrizedParametrizationList",
    ],
    ids=str,
)
def test_the_owner_of_a_node(path: str, name: str, kind: Any) -> None:
    s = Sketch()
    x = s.input()
    model = ("L['self']", nn.Linear)
    x.meta["nn_module_stack"] = {"model": model, "call@1": (path, kind), "in it": (path, kind)}
    assert owner(x) == ("call@1", name)
    assert modules_around(x) == {"model": model}


@pytest.mark.parametrize("stack", [None, {}, {"m": ("a.parametrizations.b", nn.Linear)}])
def test_a_node_that_no_list_owns(stack: Any) -> None:
    s = Sketch()
    x = s.input()
    x.meta["nn_module_stack"] = stack
    assert owner(x) is None
    assert modules_around(x) == (stack or {})
