"""``Rewrite.arguments``: which calls are calls of a rewrite's op, and with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph

from fxparam.graph.rewrites.householder_product import HOUSEHOLDER_PRODUCT
from fxparam.graph.rewrites.matrix_exp import MATRIX_EXP
from fxparam.graph.rewrites.rewrite import Call
from tests.graph.sketch import Sketch


def test_arguments_by_place_and_by_name() -> None:
    graph = Graph()
    p, t = graph.placeholder("p"), graph.placeholder("t")
    named = {"a": p, "tau": t}
    function = torch.linalg.householder_product
    for node in (
        graph.call_function(function, (p, t)),
        graph.call_function(function, (p,), {"tau": t}),
        graph.call_function(torch.orgqr, (), {"input": p, "tau": t}),
        graph.call_function(function, (), {"A": p, "tau": t}),
        graph.call_method("orgqr", (p, t)),
    ):
        assert HOUSEHOLDER_PRODUCT.arguments(node) == named


@pytest.mark.parametrize(
    ("args", "kwargs"), [("p", {"out": "t"}), ("", {}), ("pt", {}), ("p", {"A": "t"})]
)
def test_other_calls_are_left_alone(args: str, kwargs: dict[str, str]) -> None:
    graph = Graph()
    nodes: dict[str, Any] = {name: graph.placeholder(name) for name in "pt"}
    given = tuple(nodes[name] for name in args), {k: nodes[v] for k, v in kwargs.items()}
    assert MATRIX_EXP.arguments(graph.call_function(torch.matrix_exp, *given)) is None
    assert MATRIX_EXP.arguments(nodes["p"]) is None


def test_tensors_that_only_torch_knows() -> None:
    s = Sketch()
    p = s.parameter("p", 4, 4)
    sparse = s.note(torch.Tensor.to_sparse, p, value=None)
    sparse.meta["example_value"] = torch.zeros(4, 4).to_sparse()
    call = Call(p, {"a": p, "sparse": sparse, "number": 2}, autocast=False)
    assert call.tensor("a") is p.meta["example_value"]
    assert [call.tensor(name) for name in ("sparse", "number", "missing")] == [None] * 3
