"""``move_out``: an evaluation in a body is made before the call."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from tests.graph.sketch import Sketch, move, picture


def test_a_scan_takes_the_value_as_an_operand() -> None:
    s = Sketch()
    p, x, xs = s.parameter(), s.input(), s.input("xs", 4, 3, 3)
    b = Sketch(s)
    h, row, q = b.like("h", x), b.like("row", x), b.like("q", p)
    h = b.call(operator.matmul, b.call(torch.matrix_exp, q), b.call(operator.add, h, row))
    body = s.attribute("body", b.returns(h, b.call(torch.tanh, h)))
    scan = s.note(torch.ops.higher_order.scan, body, [x], [xs], [p], value=(x, xs))
    gm = s.returns(s.call(operator.getitem, scan, 0), s.call(operator.getitem, scan, 1))
    assert_expected_inline(
        picture(gm, move, matrix_exp=(1, 1)),
        """\
def forward(self, p, x, xs):
body = self.body
scan = scan(body, [x], [xs], [p])
getitem = scan[0]
getitem_1 = scan[1]
return (getitem, getitem_1)
def body(self, h, row, q):
matrix_exp = torch.matrix_exp(q)
add = h + row
matmul = matrix_exp @ add
tanh = torch.tanh(matmul)
return (matmul, tanh)
---
def forward(self, p, x, xs):
body = self.body
matrix_exp = torch.matrix_exp(p)
scan = scan(body, [x], [xs], [matrix_exp])
getitem = scan[0]
getitem_1 = scan[1]
return (getitem, getitem_1)
def body(self, h, row, matrix_exp_1):
add = h + row
matmul = matrix_exp_1 @ add
tanh = torch.tanh(matmul)
return (matmul, tanh)""",
    )


def _checkpointed(*evaluate: str) -> GraphModule:
    """A checkpoint that evaluates, by methods in turn, run twice."""
    s = Sketch()
    p, x = s.parameter(), s.input()
    b = Sketch(s)
    h, w = b.like("h", x), b.like("q", p)
    for method in evaluate:
        w = b.call(method, w)
    body = s.attribute("body", b.returns(b.call(operator.matmul, w, h)))
    for _ in range(2):
        call = s.note(torch.ops.higher_order.tag_activation_checkpoint, body, x, p, value=(x,))
        x = s.call(operator.getitem, call, 0)
    return s.returns(x)


def test_what_a_view_is_a_view_of_moves_in_its_stead() -> None:
    gm = _checkpointed("matrix_exp", "t")
    assert_expected_inline(
        picture(gm, move, matrix_exp=(1, 1), t=(1, 1)),
        """\
def forward(self, p, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, q):
matrix_exp = q.matrix_exp()
t = matrix_exp.t()
matmul = t @ h
return (matmul,)
---
def forward(self, p, x):
body = self.body
matrix_exp = p.matrix_exp()
tag_activation_checkpoint = tag_activation_checkpoint(body, x, matrix_exp)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, matrix_exp)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, matrix_exp_1):
t = matrix_exp_1.t()
matmul = t @ h
return (matmul,)""",
    )


def test_random_numbers_stay_in_the_body() -> None:
    gm = _checkpointed("sigmoid", "bernoulli", "matrix_exp")
    assert_expected_inline(
        picture(gm, move, bernoulli=(1, 1)),
        """\
def forward(self, p, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, q):
sigmoid = q.sigmoid()
bernoulli = sigmoid.bernoulli()
matrix_exp = bernoulli.matrix_exp()
matmul = matrix_exp @ h
return (matmul,)
---
def forward(self, p, x):
body = self.body
sigmoid = p.sigmoid()
tag_activation_checkpoint = tag_activation_checkpoint(body, x, sigmoid)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, sigmoid)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, sigmoid_1):
bernoulli = sigmoid_1.bernoulli()
matrix_exp = bernoulli.matrix_exp()
matmul = matrix_exp @ h
return (matmul,)""",
    )


def test_a_value_of_one_branch_stays_in_it() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    bodies = []
    for name in ("true", "false"):
        b = Sketch(s)
        h, q = b.like("h", x), b.like("q", p)
        w = b.call(torch.matrix_exp, q) if name == "true" else q
        bodies.append(s.attribute(name, b.returns(b.call(operator.matmul, w, h))))
    test = s.call(torch.gt, s.call(torch.sum, x), 0)
    cond = s.note(torch.ops.higher_order.cond, test, *bodies, (x, p), value=(x,))
    picture(s.returns(s.call(operator.getitem, cond, 0)), move, matrix_exp=(1, 1))
