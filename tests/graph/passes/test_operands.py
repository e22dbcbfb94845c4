"""Operands of calls and placeholders of bodies change together, here by a step of motion."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline

from tests.graph.sketch import Sketch, move, picture

checkpoint = torch.ops.higher_order.tag_activation_checkpoint


def test_operands_that_are_the_same_in_each_call_become_one() -> None:
    s = Sketch()
    p, q, x = s.parameter(), s.parameter("q"), s.input()
    b = Sketch(s)
    h, *given = b.like("h", x), *(b.like(name, p) for name in ("a", "b", "c"))
    for each in given:
        h = b.call(operator.matmul, each, h)
    body = s.attribute("body", b.returns(h))
    for third in (p, q):  # the same in one call alone
        call = s.note(checkpoint, body, x, p, p, third, value=(x,))
        x = s.call(operator.getitem, call, 0)
    assert_expected_inline(
        picture(s.returns(x), move),
        """\
def forward(self, p, q, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p, p, p)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p, p, q)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, a, b, c):
matmul = a @ h
matmul_1 = b @ matmul
matmul_2 = c @ matmul_1
return (matmul_2,)
---
def forward(self, p, q, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p, p)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p, q)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, a, c):
matmul = a @ h
matmul_1 = a @ matmul
matmul_2 = c @ matmul_1
return (matmul_2,)""",
    )


def test_an_operand_that_nothing_reads_any_more_is_dropped() -> None:
    s = Sketch()
    p, q, x = s.parameter(), s.parameter("q"), s.input()
    b = Sketch(s)
    h, a, c = b.like("h", x), b.like("a", p), b.like("c", q)
    h = b.call(operator.matmul, b.call(torch.matrix_exp, a), b.call(operator.matmul, c, h))
    body = s.attribute("body", b.returns(h))
    for _ in range(2):
        x = s.call(operator.getitem, s.note(checkpoint, body, x, p, q, value=(x,)), 0)
    assert_expected_inline(
        picture(s.returns(x), move, matrix_exp=(1, 1)),
        """\
def forward(self, p, q, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p, q)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p, q)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, a, c):
matrix_exp = torch.matrix_exp(a)
matmul = c @ h
matmul_1 = matrix_exp @ matmul
return (matmul_1,)
---
def forward(self, p, q, x):
body = self.body
matrix_exp = torch.matrix_exp(p)
tag_activation_checkpoint = tag_activation_checkpoint(body, x, q, matrix_exp)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, q, matrix_exp)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, c, matrix_exp_1):
matmul = c @ h
matmul_1 = matrix_exp_1 @ matmul
return (matmul_1,)""",
    )
