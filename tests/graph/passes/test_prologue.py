"""The prologue: what is computed from parameters alone comes first."""

from __future__ import annotations

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from fxparam.graph.passes.prologue import lift, prologue_of, subgraph
from tests.graph.sketch import Sketch, picture, results


def _graph(write: bool = False) -> GraphModule:
    s = Sketch()
    x, p = s.input(), s.parameter()
    b = s.input("b")
    b.meta["fxparam.parameter"] = "b"
    h = s.call(torch.tanh, x)
    if write:
        s.call("mul_", b, 2.0)
    w = s.call(torch.matrix_exp, p)
    v = s.call(operator.add, w, s.call(torch.exp, b))
    r = s.call(torch.dropout, w, 0.5, True)
    return s.returns(s.call(operator.matmul, v, h), s.call(operator.matmul, r, h))


def test_the_prologue_is_put_in_front() -> None:
    assert_expected_inline(
        picture(_graph(), lift),
        """\
def forward(self, x, p, b):
tanh = torch.tanh(x)
matrix_exp = torch.matrix_exp(p)
exp = torch.exp(b)
add = matrix_exp + exp
dropout = torch.dropout(matrix_exp, 0.5, True)
matmul = add @ tanh
matmul_1 = dropout @ tanh
return (matmul, matmul_1)
---
def forward(self, x, p, b):
matrix_exp = torch.matrix_exp(p)
exp = torch.exp(b)
add = matrix_exp + exp
tanh = torch.tanh(x)
dropout = torch.dropout(matrix_exp, 0.5, True)
matmul = add @ tanh
matmul_1 = dropout @ tanh
return (matmul, matmul_1)""",
    )


def test_what_reads_what_is_written_before_it_stays() -> None:
    gm = _graph(write=True)
    assert [node.name for node in prologue_of(gm)] == ["matrix_exp"]
    assert_expected_inline(
        picture(gm, lift),
        """\
def forward(self, x, p, b):
tanh = torch.tanh(x)
mul_ = b.mul_(2.0)
matrix_exp = torch.matrix_exp(p)
exp = torch.exp(b)
add = matrix_exp + exp
dropout = torch.dropout(matrix_exp, 0.5, True)
matmul = add @ tanh
matmul_1 = dropout @ tanh
return (matmul, matmul_1)
---
def forward(self, x, p, b):
matrix_exp = torch.matrix_exp(p)
tanh = torch.tanh(x)
mul_ = b.mul_(2.0)
exp = torch.exp(b)
add = matrix_exp + exp
dropout = torch.dropout(matrix_exp, 0.5, True)
matmul = add @ tanh
matmul_1 = dropout @ tanh
return (matmul, matmul_1)""",
    )


@pytest.mark.parametrize(("returned", "names"), [(False, []), (True, ["matrix_exp"])])
def test_what_is_returned_serves_later_runs_if_asked(returned: bool, names: list[str]) -> None:
    s = Sketch()
    gm = s.returns(s.call(torch.matrix_exp, s.parameter()))
    found = prologue_of(gm, lasting=True, returned=returned)
    assert [node.name for node in found] == names


def test_a_buffer_that_is_written_later_serves_no_later_run() -> None:
    s = Sketch()
    b = s.input("b")
    b.meta["fxparam.parameter"] = "b"
    w = s.call(torch.matrix_exp, b)
    s.call("mul_", b, 2.0)
    gm = s.returns(s.call(torch.exp, w))
    assert [node.name for node in prologue_of(gm)] == ["matrix_exp", "exp"]
    assert prologue_of(gm, lasting=True, returned=True) == []


def test_a_graph_of_some_values_reads_what_they_need() -> None:
    gm = _graph()
    (w,) = gm.graph.find_nodes(op="call_function", target=torch.matrix_exp)
    graph, read = subgraph(gm.graph, [w])
    assert [node.name for node in read] == ["p"]
    (value, *_) = results(GraphModule({}, graph))
    assert value.shape == (3, 3)
