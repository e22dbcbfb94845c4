"""What is said of an op by its schemas, where its arguments are not known."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule

from fxparam.graph.analysis.schemas import is_confined, may_alias, writes_nothing

aten = torch.ops.aten


def _user(x: Any) -> Any:
    return x


#: For each target: whether it writes nothing, and whether its value may be memory of an argument.
TARGETS: dict[str, tuple[Any, bool, bool]] = {
    "exp": (torch.exp, True, False),
    "method exp": ("exp", True, False),
    "aten.exp": (aten.exp.default, True, False),
    "packet aten.exp": (aten.exp, True, False),
    "+": (operator.add, True, False),
    "@": (operator.matmul, True, False),
    "linear": (F.linear, True, False),
    "getattr": (getattr, True, True),
    "getitem": (operator.getitem, True, True),
    "method view": ("view", True, True),
    "aten.t": (aten.t.default, True, True),
    "dropout": (torch.dropout, True, True),
    "contiguous": ("contiguous", True, True),
    "exp_": (torch.exp_, False, True),
    "method add_": ("add_", False, True),
    "aten.copy_": (aten.copy_.default, False, True),
    "batch_norm": (torch.batch_norm, False, True),
    "a function of the user's": (_user, False, True),
    "+=": (operator.iadd, False, True),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    target, pure, aliases = TARGETS[name]
    graph = Graph()
    x = graph.placeholder("x")
    create = graph.call_method if isinstance(target, str) else graph.call_function
    node = create(target, (x, x))
    assert (writes_nothing(node), may_alias(node)) == (pure, aliases)


def test_what_is_written_to_out() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    assert not writes_nothing(graph.call_function(torch.exp, (x,), {"out": x}))


class _Own(nn.Linear):
    pass


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


MODULES = {
    "torch's own": (lambda: nn.Linear(2, 2), True),
    "torch's own in each other": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()), True),
    "a subclass": (lambda: _Own(2, 2), False),
    "one of the user's in another": (lambda: nn.Sequential(_Own(2, 2)), False),
    "with a hook": (lambda: _hooked(nn.Linear(2, 2)), False),
    "with a hook in it": (lambda: nn.Sequential(_hooked(nn.Linear(2, 2))), False),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    make, confined = MODULES[name]
    holder = nn.Module()
    holder.layer = make()
    graph = Graph()
    node = graph.call_module("layer", (graph.placeholder("x"),))
    assert is_confined(GraphModule(holder, graph), node) is confined
