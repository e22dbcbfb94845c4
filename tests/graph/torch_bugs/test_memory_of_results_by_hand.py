"""What a body passes on, in graphs made by hand: taken from where it is, or returned as a copy."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from fxparam.graph import show_what_bodies_pass_on


def _bodies(gm: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    return [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule) and m is not gm]


def _without_additions(body: torch.fx.GraphModule) -> None:
    """Let a body pass on what it adds to, as a backward that torch makes would."""
    for node in body.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        node.replace_all_uses_with(node.args[0])
        body.graph.erase_node(node)
    body.recompile()


def test_a_branch_returns_copies_of_its_operands() -> None:
    def branches(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cond(x.sum() > 0, lambda x: (x.sin(), x + 1), lambda x: (x + 1, x.cos()), (x,))

    x = torch.ones(3)
    gm = make_fx(branches)(x)
    for body in _bodies(gm):
        _without_additions(body)
    show_what_bodies_pass_on(gm.graph)
    for body in _bodies(gm):
        assert all(n.op == "call_function" for n in body.graph.output_node().all_input_nodes)
        body.graph.lint()
    out = gm(x)
    assert_close(out, (x.sin(), x))
    assert out[1].data_ptr() != x.data_ptr()


def test_a_carry_that_a_loop_passes_on_is_what_it_was_at_first() -> None:
    def loop(h: Tensor, k: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        (h, k), _ = scan(lambda c, x: ((c[0] * x, c[1] + 1), c[0] * 1), (h, k), xs, dim=0)
        return h, k

    inputs = torch.ones(3), torch.full((3,), 2.0), torch.full((4, 3), 3.0)
    gm = make_fx(loop)(*inputs)
    (body,) = _bodies(gm)
    _without_additions(body)
    show_what_bodies_pass_on(gm.graph)
    gm.graph.lint()
    gm.recompile()
    given = gm.graph.find_nodes(op="placeholder")
    assert gm.graph.output_node().args[0][1] is given[1]
    assert_close(gm(*inputs), (torch.full((3,), 81.0), inputs[1]))


def _node(graph: torch.fx.Graph, op: Any, args: tuple[Any, ...], value: Any) -> torch.fx.Node:
    node = graph.call_function(op, args)
    node.meta["val"] = value
    return node


def _region(
    x: Tensor,
    returned: Callable[[torch.fx.Graph, torch.fx.Node], tuple[torch.fx.Node, ...]],
    used: tuple[int, ...] = (0,),
) -> torch.fx.GraphModule:
    """A graph that calls a region and returns some of its results, after the pass."""
    inner, outer = torch.fx.Graph(), torch.fx.Graph()
    given, operand = inner.placeholder("given"), outer.placeholder("operand")
    given.meta["val"] = operand.meta["val"] = x
    results = returned(inner, given)
    inner.output(results)
    values = tuple(each.meta["val"] for each in results)
    op = torch.ops.higher_order.invoke_subgraph
    result = _node(outer, op, (outer.get_attr("body"), "body", operand), values)
    outer.output(tuple(_node(outer, operator.getitem, (result, i), values[i]) for i in used))
    gm = torch.fx.GraphModule({"body": torch.fx.GraphModule({}, inner)}, outer)
    show_what_bodies_pass_on(gm.graph)
    gm.graph.lint()
    return gm


@pytest.mark.parametrize("computed", [False, True])
def test_a_view_that_a_region_returns(computed: bool) -> None:
    """It is taken from the operand, or copied where the graph around cannot make it."""
    aten, x = torch.ops.aten, torch.arange(6.0)

    def returned(graph: torch.fx.Graph, given: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
        size = _node(graph, aten.sym_size.int, (given, 0), 6)
        rows = _node(graph, operator.floordiv, (size, 3), 2) if computed else 2
        viewed = _node(graph, aten.view.default, (given, [rows, 3]), x.view(2, 3))
        return (_node(graph, aten.permute.default, (viewed, [1, 0]), x.view(2, 3).mT),)

    gm = _region(x, returned)
    (inside,) = gm.body.graph.output_node().all_input_nodes
    assert (inside.target is aten.clone.default) == computed
    (out,) = gm.graph.output_node().all_input_nodes
    assert out.target is (operator.getitem if computed else aten.permute.default)
    if not computed:
        assert out.meta["val"].untyped_storage()._cdata == x.untyped_storage()._cdata


def test_a_part_of_an_operand_that_a_region_returns() -> None:
    x = torch.arange(6.0)

    def returned(graph: torch.fx.Graph, given: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
        parts = _node(graph, torch.ops.aten.split.Tensor, (given, 3), x.split(3))
        return (_node(graph, operator.getitem, (parts, 1), x[3:]),)

    gm = _region(x, returned)
    (out,) = gm.graph.output_node().all_input_nodes
    (parts,) = out.all_input_nodes
    assert parts.target is torch.ops.aten.split.Tensor
    assert_close(out.meta["val"], x[3:])


def test_an_operand_in_a_result_that_is_no_view_of_it() -> None:
    """Where one of several results shows an operand, the op is no view; the region copies."""
    x = torch.arange(6.0)

    def returned(graph: torch.fx.Graph, given: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
        both = _node(graph, lambda x: (x, x + 1), (given,), (x, x + 1))
        return tuple(_node(graph, operator.getitem, (both, i), (x, x + 1)[i]) for i in (0, 1))

    gm = _region(x, returned, used=(0, 1))
    first, second = gm.body.graph.output_node().all_input_nodes
    assert (first.target, second.target) == (torch.ops.aten.clone.default, operator.getitem)


def test_what_a_region_returns_twice_is_taken_from_one_result() -> None:
    aten, x = torch.ops.aten, torch.arange(6.0).view(2, 3)
    value = x.tanh()

    def returned(graph: torch.fx.Graph, given: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
        computed = _node(graph, aten.tanh.default, (given,), value)
        turned = _node(graph, aten.permute.default, (computed, [1, 0]), value.mT)
        return (turned, computed) * 2

    gm = _region(x, returned, used=(3, 2, 0))
    (taken,) = gm.graph.find_nodes(op="call_function", target=operator.getitem)
    assert taken.args[1] == 1
    first, *turned = gm.graph.output_node().args[0]
    assert first is taken
    assert [n.target for n in turned] == [aten.permute.default] * 2


def test_a_branch_returns_no_memory_twice() -> None:
    def branches(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cond(x.sum() > 0, lambda x: (x.sin(), x + 1), lambda x: (x + 1, x.cos()), (x,))

    x = torch.ones(3)
    gm = make_fx(branches)(x)
    for body in _bodies(gm):
        output = body.graph.output_node()
        output.args = ((output.args[0][0],) * 2,)
        body.recompile()
    show_what_bodies_pass_on(gm.graph)
    for body in _bodies(gm):
        assert len(body.graph.output_node().all_input_nodes) == 2
    assert_close(gm(x), (x.sin(), x.sin()))
