"""What a body returns must not be the memory it was given, unless the graph around can see it.

Inductor uses the memory of an operand for other values once the operand has no more readers. Where
a body returns an operand, or a view of one, that memory is the result's too, and the result is
overwritten. Programs may not have such bodies, but torch makes them: in the backward of ``scan``,
an operand without a gradient has a carry of zeros that is passed on from step to step; and the
forward of ``nested_compile_region`` returns views of its operands, saved for backward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from fxparam.graph.bodies import Body, Call, call_of
from fxparam.graph.nodes import is_view, meta_with, value_of

__all__ = ["show_what_bodies_pass_on"]


def show_what_bodies_pass_on(graph: Graph) -> None:
    """Take what a body only passes on from its operand, or let the body return a copy.

    Args:
        graph: an ATen graph, forward or backward, before Inductor lowers it.
    """
    gm = graph.owning_module
    for node in list(graph.nodes):
        call = call_of(gm, node) if gm is not None else None
        if call is not None and call.op in _BY_OP:
            _BY_OP[call.op](call)


def _of_a_loop(call: Call) -> None:
    """A carry that is passed on in each run is what it was at first."""
    body = call.bodies[-1]
    first: Any = call.node.args[1 if call.op == "scan" else 2]
    for i, returned in enumerate(_returned(body)[: len(first)]):
        if returned is body.placeholders[i]:
            _replace_result(call.node, i, first[i])
        elif _views(returned) is not None:
            _return_a_copy(body, i)


def _of_branches(call: Call) -> None:
    for body in call.bodies:
        for i, returned in enumerate(_returned(body)):
            if _views(returned) is not None:
                _return_a_copy(body, i)


def _of_a_region(call: Call) -> None:
    (body,) = call.bodies
    for i, returned in enumerate(_returned(body)):
        views = _views(returned)
        if views is None or not any(_is_result(user, i) for user in call.node.users):
            continue
        around = dict(zip(body.placeholders, call.operands, strict=True))
        with call.node.graph.inserting_before(call.node):
            for view in views:
                if all(isinstance(around.get(n), Node) for n in view.all_input_nodes):
                    around[view] = _copied(call.node.graph, view, around.__getitem__)
        if isinstance(around.get(returned), Node):
            _replace_result(call.node, i, around[returned])
        else:  # a view whose sizes the body computes
            _return_a_copy(body, i)


_BY_OP: dict[str, Callable[[Call], None]] = {
    "scan": _of_a_loop,
    "while_loop": _of_a_loop,
    "cond": _of_branches,
    "invoke_subgraph": _of_a_region,
}


def _returned(body: Body) -> tuple[Any, ...]:
    returned = body.module.graph.output_node().args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _views(returned: Any) -> list[Node] | None:
    """The views that lead from an operand to a tensor that shows its memory, in order."""
    views: list[Node] = []
    while isinstance(returned, Node) and isinstance(value_of(returned), torch.Tensor):
        if returned.op == "placeholder":
            return views[::-1]
        if returned.op != "call_function" or not is_view(returned):
            return None
        views.append(returned)
        returned = returned.args[0]
    return None


def _copied(graph: Graph, view: Node, operand: Callable[[Node], Node]) -> Node:
    copied = graph.node_copy(view, operand)
    args, kwargs = torch.fx.map_arg((copied.args, copied.kwargs), value_of)
    assert callable(view.target)
    copied.meta = meta_with(view, view.target(*args, **kwargs))
    return copied


def _is_result(node: Node, i: int) -> bool:
    return node.target is operator.getitem and bool(node.args[1] == i)


def _replace_result(node: Node, i: int, value: Node) -> None:
    for user in list(node.users):
        if _is_result(user, i):
            user.replace_all_uses_with(value)
            node.graph.erase_node(user)


def _return_a_copy(body: Body, i: int) -> None:
    graph = body.module.graph
    output, returned = graph.output_node(), list(_returned(body))
    given = returned[i]
    with graph.inserting_before(output):
        copied = graph.call_function(torch.ops.aten.clone.default, (given,))
    copied.meta = meta_with(given, value_of(given).clone())
    returned[i] = copied
    output.args = (returned if isinstance(output.args[0], list) else tuple(returned),)
    body.module.recompile()
