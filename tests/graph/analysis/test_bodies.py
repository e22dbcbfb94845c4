"""What a node that runs bodies runs, on which operands, and how often."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.bodies import Call, call_of, is_run_by_itself
from tests.graph.sketch import Sketch

ops = torch.ops.higher_order


def _called(op: Any, arrange: Any, bodies: int = 1, inputs: int = 2) -> tuple[GraphModule, Node]:
    """A call of ``op`` with the arguments that ``arrange`` makes of bodies and two operands."""
    s = Sketch()
    x, p = s.input(), s.parameter()
    found = []
    for i in range(bodies):
        b = Sketch(s)
        given = [b.like(f"a{k}", x) for k in range(inputs)]
        found.append(s.attribute(f"body_{i}", b.returns(b.call(operator.add, given[0], given[-1]))))
    node = s.note(op, *arrange(found, x, p), value=(x,))
    return s.returns(s.call(operator.getitem, node, 0)), node


def _call(op: Any, arrange: Any, **options: int) -> Call:
    gm, node = _called(op, arrange, **options)
    call = call_of(gm, node)
    assert call is not None
    return call


# For each op: its arguments, the number of bodies and of their inputs; what varies, what stays, how
# often it runs, and whether each body always does.
CALLS = {
    "scan": (lambda b, x, p: (*b, [x], [x], [p]), 1, 3, ["x", "x"], ["p"], 3, [True]),
    "map_impl": (lambda b, x, p: (*b, [x], [p]), 1, 2, ["x"], ["p"], 3, [True]),
    "while_loop": (
        lambda b, x, p: (*b, (x,), (p,)),
        *(2, 2, ["x"], ["p"], None, [True, False]),
    ),
    "cond": (lambda b, x, p: (x, *b, (x, p)), 2, 2, [], ["x", "p"], None, [False, False]),
    "switch": (lambda b, x, p: (x, b, (x, p)), 3, 2, [], ["x", "p"], None, [False] * 3),
    "tag_activation_checkpoint": (
        lambda b, x, p: (*b, x, p),
        *(1, 2, [], ["x", "p"], 1, [True]),
    ),
    "invoke_subgraph": (
        lambda b, x, p: (*b, "name", x, p),
        *(1, 2, [], ["x", "p"], 1, [True]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_layouts(name: str) -> None:
    if name == "switch":
        pytest.importorskip("torch._higher_order_ops.switch", reason="torch 2.14 and newer")
    arrange, bodies, inputs, varying, operands, iterations, always = CALLS[name]
    call = _call(getattr(ops, name), arrange, bodies=bodies, inputs=inputs)
    assert call.op == name
    assert [v.name for v in call.varying] == varying
    assert [v.name for v in call.operands] == operands
    assert call.iterations == iterations
    assert [body.always for body in call.bodies] == always
    assert call.loops == bool(varying) and call.branches == (name in ("cond", "switch"))
    assert call.inlined == (name == "tag_activation_checkpoint")
    assert is_run_by_itself(call.node) == (not call.inlined)


REFUSED = {
    "a function": (torch.add, lambda b, x, p: (x, p)),
    "an op that is in no table": (ops.flex_attention, lambda b, x, p: (*b, x, p)),
    "an argument that is no body": (ops.tag_activation_checkpoint, lambda b, x, p: (x, x, p)),
    "another number of operands": (ops.tag_activation_checkpoint, lambda b, x, p: (*b, x)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood(name: str) -> None:
    gm, node = _called(*REFUSED[name])
    assert call_of(gm, node) is None


def test_a_tensor_among_the_keywords_is_not_understood() -> None:
    gm, node = _called(ops.tag_activation_checkpoint, lambda b, x, p: (*b, x, p))
    node.kwargs = {"use_reentrant": False}
    assert call_of(gm, node) is not None
    node.kwargs = {"weight": node.args[1]}
    assert call_of(gm, node) is None


def test_operands_that_are_set() -> None:
    arrange = CALLS["scan"][0]
    gm, node = _called(ops.scan, arrange, inputs=3)
    call = call_of(gm, node)
    assert call is not None
    (x,) = node.args[1]
    call.set_operands([x, x])
    assert node.args[1:] == ([x], [x], [x, x])
    assert call_of(gm, node) is None  # its body has not as many placeholders yet


def test_what_is_run_by_itself() -> None:
    _, node = _called(ops.while_loop, CALLS["while_loop"][0], bodies=2)
    assert is_run_by_itself(node)
    s = Sketch()
    assert not is_run_by_itself(s.call(torch.exp, s.input()))
