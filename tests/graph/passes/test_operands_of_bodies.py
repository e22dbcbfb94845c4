"""Operands of calls and placeholders of their bodies, changed together, in graphs built by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxparam._torch.fx import copy_nodes, hold
from fxparam.graph.analysis.bodies import Call, call_of
from fxparam.graph.passes.operands import (
    Operand,
    add_operands,
    drop_operands,
    merge_operands,
    used_operands,
)

CONDITION: Any = torch.ops.higher_order.cond
P, Q = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])


def _branch(op: Any, read: tuple[int, int]) -> GraphModule:
    """Return a branch on three operands, of which it reads two."""
    graph = Graph()
    placeholders = [graph.placeholder(name) for name in "abc"]
    result = graph.call_function(op, tuple(placeholders[i] for i in read))
    graph.output((result,))
    return GraphModule(nn.Module(), graph)


def _two_branches(read: tuple[int, int]) -> tuple[GraphModule, Call]:
    """Return ``cond(true, p + q, p * q, (p, q, p))`` and its call."""
    root, graph = nn.Module(), Graph()
    root.then, root.otherwise = _branch(torch.add, read), _branch(torch.mul, read)
    which, p, q = (graph.placeholder(name) for name in ("which", "p", "q"))
    bodies = graph.get_attr("then"), graph.get_attr("otherwise")
    graph.output(graph.call_function(CONDITION, (which, *bodies, (p, q, p))))
    gm = GraphModule(root, graph)
    return gm, _call(gm)


def _call(gm: GraphModule) -> Call:
    (node,) = gm.graph.find_nodes(op="call_function", target=CONDITION)
    call = call_of(gm, node)
    assert call is not None
    return call


def _results(gm: GraphModule) -> list[Tensor]:
    for module in (gm, *(body.module for body in _call(gm).bodies)):
        module.graph.lint()
        module.recompile()
    return [gm(torch.tensor(which), P, Q)[0] for which in (True, False)]


def test_equal_operands_become_one() -> None:
    gm, call = _two_branches(read=(2, 1))
    assert merge_operands([call]) == 1
    assert [node.name for node in _call(gm).operands] == ["p", "q"]
    assert all(len(body.placeholders) == 2 for body in call.bodies)
    torch.testing.assert_close(_results(gm), [P + Q, P * Q])
    assert merge_operands([_call(gm)]) == 0


def test_operands_that_no_body_reads_are_dropped() -> None:
    gm, call = _two_branches(read=(1, 2))
    assert used_operands(call) == {1, 2}
    drop_operands([call], {0})
    assert [node.name for node in _call(gm).operands] == ["q", "p"]
    torch.testing.assert_close(_results(gm), [Q + P, Q * P])


def test_an_added_operand_enters_every_body() -> None:
    gm, call = _two_branches(read=(0, 1))
    with gm.graph.inserting_before(call.node):
        value = gm.graph.call_function(torch.neg, (call.operands[0],))
    operand = Operand([value], "a", {"made": "here"})
    ((then, otherwise),) = add_operands([call], [operand])
    assert then.meta == otherwise.meta == {"made": "here"}
    assert then.target == then.name == "a_1"
    for body, placeholder in zip(call.bodies, (then, otherwise), strict=True):
        body.placeholders[0].replace_all_uses_with(placeholder)
    now = _call(gm)
    assert now.operands[-1] is value
    assert used_operands(now) == {1, 3}
    torch.testing.assert_close(_results(gm), [Q - P, -P * Q])


def test_a_copy_reads_attributes_of_its_own_module() -> None:
    root, target = nn.Module(), GraphModule(nn.Module(), Graph())
    root.register_buffer("scale", P)
    root.register_parameter("bias", nn.Parameter(Q))
    graph = Graph()
    x = graph.placeholder("x")
    scaled = graph.call_function(torch.mul, (x, graph.get_attr("scale")))
    result = graph.call_function(torch.add, (scaled, graph.get_attr("bias")))
    graph.output(result)
    source = GraphModule(root, graph)

    assert hold(target, "scale", Q) == "scale"
    copies = {x: target.graph.placeholder("y")}
    inside = [node for node in graph.nodes if node.op != "output"]
    copy_nodes(inside, target.graph, copies, modules=(source, target))
    target.graph.output(copies[result])
    target.graph.lint()
    target.recompile()
    torch.testing.assert_close(target(Q), Q * P + Q)
    assert target.scale_1 is source.scale
    assert target.bias is source.bias
    assert list(target.state_dict()) == ["bias"]
    assert hold(target, "scale", P) == "scale_1"
