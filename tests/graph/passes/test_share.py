"""``share``: repeated evaluations of one straight-line graph become one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from fxparam.graph.passes.share import share
from fxparam.graph.rules import Rule
from tests.graph.sketch import Sketch, levels, picture


def _share(gm: GraphModule, **options: Any) -> dict[str, Rule]:
    """Share in each graph; the refusals by the names of nodes."""
    results = [share(level, **options) for level in levels(gm)]
    return {node.name: rule for each in results for node, rule in each.refusals.items()}


def _two_accesses() -> GraphModule:
    s = Sketch()
    p, x = s.parameter(), s.input()
    for _ in range(2):
        x = s.call(operator.matmul, s.call(torch.matrix_exp, p), x)
    return s.returns(x)


def test_the_later_access_uses_the_value_of_the_first() -> None:
    assert_expected_inline(
        picture(_two_accesses(), _share, matrix_exp=(2, 1)),
        """\
def forward(self, p, x):
matrix_exp = torch.matrix_exp(p)
matmul = matrix_exp @ x
matrix_exp_1 = torch.matrix_exp(p)
matmul_1 = matrix_exp_1 @ matmul
return (matmul_1,)
---
def forward(self, p, x):
matrix_exp = torch.matrix_exp(p)
matmul = matrix_exp @ x
matmul_1 = matrix_exp @ matmul
return (matmul_1,)""",
    )


def test_a_chain_that_draws_shares_its_pure_prefix() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    for _ in range(2):
        w = s.call(torch.dropout, s.call(torch.matrix_exp, p), 0.5, True)
        x = s.call(operator.matmul, w, x)
    gm = s.returns(x)
    refusals = {}
    assert_expected_inline(
        picture(gm, lambda gm: refusals.update(_share(gm)), matrix_exp=(2, 1), dropout=(2, 2)),
        """\
def forward(self, p, x):
matrix_exp = torch.matrix_exp(p)
dropout = torch.dropout(matrix_exp, 0.5, True)
matmul = dropout @ x
matrix_exp_1 = torch.matrix_exp(p)
dropout_1 = torch.dropout(matrix_exp_1, 0.5, True)
matmul_1 = dropout_1 @ matmul
return (matmul_1,)
---
def forward(self, p, x):
matrix_exp = torch.matrix_exp(p)
dropout = torch.dropout(matrix_exp, 0.5, True)
matmul = dropout @ x
dropout_1 = torch.dropout(matrix_exp, 0.5, True)
matmul_1 = dropout_1 @ matmul
return (matmul_1,)""",
    )
    assert refusals == {"dropout": Rule.RANDOM, "dropout_1": Rule.RANDOM}


def test_an_original_that_is_written_between_keeps_both() -> None:
    s = Sketch()
    p, x = s.input("p"), s.input()
    p.meta["fxparam.parameter"] = "p"
    x = s.call(operator.matmul, s.call(torch.matrix_exp, p), x)
    s.call("mul_", p, 1.5)
    gm = s.returns(s.call(operator.matmul, s.call(torch.matrix_exp, p), x))
    refusals = {}
    picture(gm, lambda gm: refusals.update(_share(gm)), matrix_exp=(2, 2))
    assert refusals["matrix_exp_1"] is Rule.ORIGINAL_WRITTEN


def test_literals_of_other_types_and_signs_are_other_functions() -> None:
    s = Sketch()
    p = s.parameter()
    gm = s.returns(*(s.call(torch.mul, p, literal) for literal in (0.0, -0.0, 0, 1, 1.0, True)))
    picture(gm, _share, mul=(6, 6))


def test_a_value_larger_than_max_bytes_is_not_shared() -> None:
    for max_bytes, left in ((3 * 3 * 8, 1), (3 * 3 * 8 - 1, 2)):
        gm = _two_accesses()
        picture(gm, lambda gm, m=max_bytes: _share(gm, max_bytes=m), matrix_exp=(2, left))
