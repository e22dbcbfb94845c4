"""``hoist``: one evaluation for all accesses, in a graph and in the bodies that it runs."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from fxparam.graph import hoist
from tests.graph.sketch import Sketch, picture


def _accesses_in_and_around_a_scan() -> GraphModule:
    s = Sketch()
    p, x, xs = s.parameter(), s.input(), s.input("xs", 4, 3, 3)
    b = Sketch(s)
    h, row, q = b.like("h", x), b.like("row", x), b.like("q", p)
    for _ in range(2):
        h = b.call(operator.matmul, b.evaluation(torch.matrix_exp, q), h)
    h = b.call(operator.add, h, row)
    body = s.attribute("body", b.returns(h, b.call(torch.tanh, h)))
    x = s.call(operator.matmul, s.evaluation(torch.matrix_exp, p), x)
    scan = s.note(torch.ops.higher_order.scan, body, [x], [xs], [p], value=(x, xs))
    return s.returns(s.call(operator.getitem, scan, 0), s.call(operator.getitem, scan, 1))


def test_accesses_in_a_body_and_around_it_share_one_value() -> None:
    results = []

    def rewrite(gm: GraphModule) -> None:
        results.append(hoist(gm, grad_enabled=True))

    gm = _accesses_in_and_around_a_scan()
    assert_expected_inline(
        picture(gm, rewrite, matrix_exp=(3, 1)),
        """\
def forward(self, p, x, xs):
body = self.body
matrix_exp = torch.matrix_exp(p)
matmul = matrix_exp @ x
scan = scan(body, [matmul], [xs], [p])
getitem = scan[0]
getitem_1 = scan[1]
return (getitem, getitem_1)
def body(self, h, row, q):
matrix_exp = torch.matrix_exp(q)
matmul = matrix_exp @ h
matrix_exp_1 = torch.matrix_exp(q)
matmul_1 = matrix_exp_1 @ matmul
add = matmul_1 + row
tanh = torch.tanh(add)
return (add, tanh)
---
def forward(self, p, x, xs):
body = self.body
matrix_exp = torch.matrix_exp(p)
matmul = matrix_exp @ x
scan = scan(body, [matmul], [xs], [matrix_exp])
getitem = scan[0]
getitem_1 = scan[1]
return (getitem, getitem_1)
def body(self, h, row, matrix_exp_2):
matmul = matrix_exp_2 @ h
matmul_1 = matrix_exp_2 @ matmul
add = matmul_1 + row
tanh = torch.tanh(add)
return (add, tanh)""",
    )
    first, again = results
    assert first.graph_module is gm and first.modified and first.has_bodies
    assert not again.modified


def test_an_empty_block_without_grad_is_not_left_behind() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    for _ in range(2):
        s.note(torch._C._set_grad_enabled, False)
        w = s.call(torch.matrix_exp, p)
        s.note(torch._C._set_grad_enabled, True)
        x = s.call(operator.matmul, w, x)
    gm = s.returns(x)
    assert_expected_inline(
        picture(
            gm,
            lambda gm: hoist(gm, grad_enabled=True),
            matrix_exp=(2, 1),
            _set_grad_enabled=(4, 2),
        ),
        """\
def forward(self, p, x):
_set_grad_enabled = torch._C._set_grad_enabled(False)
matrix_exp = torch.matrix_exp(p)
_set_grad_enabled_1 = torch._C._set_grad_enabled(True)
matmul = matrix_exp @ x
_set_grad_enabled_2 = torch._C._set_grad_enabled(False)
matrix_exp_1 = torch.matrix_exp(p)
_set_grad_enabled_3 = torch._C._set_grad_enabled(True)
matmul_1 = matrix_exp_1 @ matmul
return (matmul_1,)
---
def forward(self, p, x):
_set_grad_enabled = torch._C._set_grad_enabled(False)
matrix_exp = torch.matrix_exp(p)
_set_grad_enabled_1 = torch._C._set_grad_enabled(True)
matmul = matrix_exp @ x
matmul_1 = matrix_exp @ matmul
return (matmul_1,)""",
    )
