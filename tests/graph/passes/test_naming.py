"""``label``: nodes of evaluations say which tensor and step they are of, values are named so."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from fxparam.graph.passes.naming import STEP, Step, label
from tests.graph.sketch import Sketch, picture


def _two_accesses() -> GraphModule:
    s = Sketch()
    p, x = s.parameter(), s.input()
    for call in range(2):
        w = s.evaluation(
            torch.matrix_exp, s.evaluation(torch.tril, p, call=call), call=call, step=1
        )
        x = s.call(operator.matmul, w, x)
    return s.returns(x)


def test_values_are_named_after_their_tensors() -> None:
    assert_expected_inline(
        picture(_two_accesses(), label),
        """\
def forward(self, p, x):
tril = torch.tril(p)
matrix_exp = torch.matrix_exp(tril)
matmul = matrix_exp @ x
tril_1 = torch.tril(p)
matrix_exp_1 = torch.matrix_exp(tril_1)
matmul_1 = matrix_exp_1 @ matmul
return (matmul_1,)
---
def forward(self, p, x):
tril = torch.tril(p)
cell_weight = torch.matrix_exp(tril)
matmul = cell_weight @ x
tril_1 = torch.tril(p)
cell_weight_1 = torch.matrix_exp(tril_1)
matmul_1 = cell_weight_1 @ matmul
return (matmul_1,)""",
    )


def test_nodes_say_their_step() -> None:
    gm = _two_accesses()
    assert label(gm) == {"matrix_exp": "cell_weight", "matrix_exp_1": "cell_weight_1"}
    steps = {node.name: node.meta[STEP] for node in gm.graph.nodes if STEP in node.meta}
    assert steps == {
        "tril": Step("cell.weight", 0),
        "cell_weight": Step("cell.weight", 1),
        "tril_1": Step("cell.weight", 0),
        "cell_weight_1": Step("cell.weight", 1),
    }
    assert label(gm) == {}
