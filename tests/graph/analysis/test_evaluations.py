"""Which nodes evaluate which parametrized tensor, or another parameter-derived value."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule

from fxparam.graph.analysis.evaluations import Evaluation, all_evaluations, evaluations
from tests.graph.sketch import Sketch, levels


def _graph() -> GraphModule:
    """Two evaluations, interleaved, of ``cell.weight``; a value that no list computes."""
    s = Sketch()
    p, x = s.parameter(), s.input()
    q = s.parameter("l_self_modules_head_parameters_raw_")
    first = s.evaluation(torch.tril, p, call=0)
    again = s.evaluation(torch.tril, p, call=1)
    x = s.call(operator.matmul, s.evaluation(torch.matrix_exp, first, call=0), x)
    x = s.call(operator.matmul, s.evaluation(torch.matrix_exp, again, call=1), x)
    softplus = s.call(torch.exp, s.call(torch.neg, q))
    return s.returns(s.call(operator.matmul, s.call("t", softplus), x))


def _described(found: list[Evaluation]) -> list[tuple[str, list[str], int | None]]:
    return [(e.name, [node.name for node in e.nodes], e.runs) for e in found]


def test_evaluations_of_parametrized_tensors() -> None:
    found = evaluations(_graph().graph, runs=2)
    assert _described(found) == [
        ("cell.weight", ["tril", "matrix_exp"], 2),
        ("cell.weight", ["tril_1", "matrix_exp_1"], 2),
    ]
    assert len({e.access for e in found}) == 2


def test_values_that_no_list_computes() -> None:
    found = all_evaluations(levels(_graph()))
    # The value itself, not what it is computed from nor the view of it.
    assert _described(found)[2:] == [("exp(head.raw)", ["exp"], 1)]
    assert found[2].access == ""


def test_evaluations_in_a_body_run_as_often_as_it_does() -> None:
    s = Sketch()
    p, x, xs = s.parameter(), s.input(), s.input("xs", 4, 3, 3)
    b = Sketch(s)
    h, row, q = b.like("h", x), b.like("row", x), b.like("q", p)
    h = b.call(operator.matmul, b.evaluation(torch.matrix_exp, q), b.call(operator.add, h, row))
    body = s.attribute("body", b.returns(h, b.call(torch.neg, h)))
    scan = s.note(torch.ops.higher_order.scan, body, [x], [xs], [p], value=(x, xs))
    found = all_evaluations(levels(s.returns(s.call(operator.getitem, scan, 0))))
    assert _described(found) == [("cell.weight", ["matrix_exp"], 4)]


def test_a_graph_without_any() -> None:
    s = Sketch()
    gm = s.returns(s.call(torch.exp, s.input()))
    assert evaluations(gm.graph) == all_evaluations(levels(gm)) == []
