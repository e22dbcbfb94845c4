"""``take_outside``: what a region around the graph evaluates becomes an input of the graph."""

from __future__ import annotations

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import GraphModule, Node
from torch.testing import assert_close

from fxparam import marks
from fxparam.graph.passes.take_outside import (
    CannotTakeOut,
    is_in_a_region_around,
    take_outside,
)
from tests.graph.sketch import Sketch, text

TRACE, CHAIN = 1, 7


def _mark(node: Node, *, value: bool = False, region: str | None = None) -> Node:
    chain = marks.value(TRACE, CHAIN)
    node.meta["custom"] = {
        marks.REGION: marks.region_around(TRACE) if region is None else region,
        marks.EVALUATION: marks.evaluation("", chain, "training", "grad", 0),
        **({marks.VALUE: chain} if value else {}),
    }
    return node


def _as_of_dynamo(gm: GraphModule) -> GraphModule:
    gm._param_name_to_source = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None
    return gm


def _graph(region: str | None = None) -> GraphModule:
    s = Sketch()
    x, p = s.input(), s.parameter()
    w = _mark(s.call(torch.tril, p), region=region)
    w = _mark(s.call(torch.matrix_exp, w), value=True, region=region)
    return _as_of_dynamo(s.returns(s.call(operator.matmul, w, s.call(operator.matmul, w, x))))


def test_an_evaluation_becomes_an_input() -> None:
    gm = _graph()
    before = text(gm)
    after, (taken,), alone = take_outside(gm, grad_enabled=True)
    assert text(gm) == before  # Dynamo still reads its own
    assert_expected_inline(
        f"{before}\n---\n{text(after)}",
        """\
def forward(self, x, p):
tril = torch.tril(p)
matrix_exp = torch.matrix_exp(tril)
matmul = matrix_exp @ x
matmul_1 = matrix_exp @ matmul
return (matmul_1,)
---
def forward(self, x, p, matrix_exp_of_region):
matmul = matrix_exp_of_region @ x
matmul_1 = matrix_exp_of_region @ matmul
return (matmul_1,)""",
    )
    after.graph.lint()
    assert (taken.chain, taken.training, taken.modes) == (CHAIN, "training", "grad")
    assert (taken.inputs, taken.attributes, taken.value.shape) == ((1,), (), (3, 3))
    x, p = (torch.randn(3, 3, dtype=torch.float64) for _ in range(2))
    assert_close(after(x, p, torch.matrix_exp(p.tril())), gm(x, nn.Parameter(p)))
    # There is nothing left to take.
    assert is_in_a_region_around(gm) and not is_in_a_region_around(after)
    again, nothing, _ = take_outside(after, grad_enabled=True)
    assert nothing == [] and text(again) == text(after)


def test_an_evaluation_for_another_region_stays() -> None:
    gm = _graph(region=marks.region(TRACE, 1))
    after, taken, _ = take_outside(gm, grad_enabled=True)
    assert taken == [] and text(after) == text(gm)


def test_a_block_without_grad_that_is_left_empty_goes_too() -> None:
    s = Sketch()
    x, p = s.input(), s.parameter()
    s.note(torch._C._set_grad_enabled, False)
    w = _mark(s.call(torch.matrix_exp, p), value=True)
    s.note(torch._C._set_grad_enabled, True)
    gm = _as_of_dynamo(s.returns(s.call(operator.matmul, w, x)))
    before = text(gm)
    after, _, _ = take_outside(gm, grad_enabled=True)
    assert_expected_inline(
        f"{before}\n---\n{text(after)}",
        """\
def forward(self, x, p):
_set_grad_enabled = torch._C._set_grad_enabled(False)
matrix_exp = torch.matrix_exp(p)
_set_grad_enabled_1 = torch._C._set_grad_enabled(True)
matmul = matrix_exp @ x
return (matmul,)
---
def forward(self, x, p, matrix_exp_of_region):
matmul = matrix_exp_of_region @ x
return (matmul,)""",
    )


@pytest.mark.parametrize(
    ("reason", "build"),
    [
        ("its value is written", lambda s, p, w, x: s.call("mul_", w, 2.0)),
        (
            "it is evaluated several times",
            lambda s, p, w, x: _mark(s.call(torch.matrix_exp, p), value=True),
        ),
        (
            "the graph itself takes gradients",
            lambda s, p, w, x: s.note(torch.autograd.grad, w, p, value=(x,)),
        ),
    ],
)
def test_what_cannot_be_taken_out_says_why(reason: str, build: object) -> None:
    s = Sketch()
    x, p = s.input(), s.parameter()
    w = _mark(s.call(torch.matrix_exp, p), value=True)
    build(s, p, w, x)  # type: ignore[operator]
    gm = _as_of_dynamo(s.returns(s.call(operator.matmul, w, x)))
    before = text(gm)
    with pytest.raises(CannotTakeOut, match=reason) as refused:
        take_outside(gm, grad_enabled=True)
    assert refused.value.chains == [CHAIN]
    assert text(gm) == before


def test_what_it_reads_may_not_be_written_before() -> None:
    s = Sketch()
    x, p = s.input(), s.input("p")
    s.call("mul_", p, 2.0)
    w = _mark(s.call(torch.matrix_exp, p), value=True)
    gm = _as_of_dynamo(s.returns(s.call(operator.matmul, w, x)))
    with pytest.raises(CannotTakeOut, match="what it reads is written before"):
        take_outside(gm, grad_enabled=True)
