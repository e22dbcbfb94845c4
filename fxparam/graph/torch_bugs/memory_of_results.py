"""What a body returns is memory of its own, unless the graph around can see whose it is.

Inductor uses the memory of an operand or a result for other values once it has no more readers.
Where a body returns an operand, or a view of one, or the same memory twice, that memory is another
result's too, which is overwritten. Programs may not have such bodies, but torch makes them: in the
backward of ``scan``, an operand without a gradient has a carry of zeros that is passed on from step
to step; the forward of ``nested_compile_region`` returns views of its operands, saved for backward,
and what it computes twice where that is saved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from fxparam._torch.fx import copy_nodes
from fxparam._torch.tensors import storage_of
from fxparam.graph.analysis.bodies import Body, Call, call_of
from fxparam.graph.analysis.nodes import is_view, meta_with, value_of

__all__ = ["show_what_bodies_pass_on"]


def show_what_bodies_pass_on(graph: Graph) -> None:
    """Take what a body passes on, or returns twice, from where it is, or let it return a copy.

    Args:
        graph: an ATen graph, forward or backward, before Inductor lowers it.
    """
    gm = graph.owning_module
    for node in list(graph.nodes):
        call = call_of(gm, node) if gm is not None else None
        if call is not None and call.op in _BY_OP:
            _BY_OP[call.op](call)


def _of_a_loop(call: Call) -> None:
    """Return a carry that is passed on in each run is what it was at first."""
    body = call.bodies[-1]
    first: Any = call.node.args[1 if call.op == "scan" else 2]
    for i, (source, *views) in _shown(body).items():
        if i < len(first) and source is body.placeholders[i] and not views:
            _replace_result(call.node, i, first[i])
        elif i < len(first) or source.op != "placeholder":
            _return_a_copy(body, i)


def _of_branches(call: Call) -> None:
    for body in call.bodies:
        for i in _shown(body):
            _return_a_copy(body, i)


def _of_a_region(call: Call) -> None:
    """Calls of a region share its code: whether it returns a copy depends on the body alone."""
    (body,) = call.bodies
    for i, (source, *views) in _shown(body).items():
        returned, known = _returned(body), {*body.placeholders}
        if source in returned and returned.index(source) != i:
            known.add(source)
        for view in views:
            if known.issuperset(view.all_input_nodes):
                known.add(view)
        if returned[i] not in known:  # a view whose sizes the body computes, or of what stays there
            _return_a_copy(body, i)
        elif any(_is_result(user, i) for user in call.node.users):
            around: dict[Node, Any] = dict(zip(body.placeholders, call.operands, strict=True))
            if source not in around:
                around[source] = _result(call.node, returned.index(source))
            _replace_result(call.node, i, _rebuilt(call.node, around, source, views))


_BY_OP: dict[str, Callable[[Call], None]] = {
    "scan": _of_a_loop,
    "while_loop": _of_a_loop,
    "cond": _of_branches,
    "invoke_subgraph": _of_a_region,
}


def _returned(body: Body) -> tuple[Any, ...]:
    returned = body.module.graph.output_node().args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _shown(body: Body) -> dict[int, list[Node]]:
    """The results that show an operand's memory, or another result's: from it, view by view."""
    returned = {
        i: each
        for i, each in enumerate(_returned(body))
        if isinstance(each, Node) and isinstance(value_of(each), torch.Tensor)
    }
    chains = {each: _chain(each) for each in returned.values()}
    owners: dict[object, Node] = {}
    for each in [*body.placeholders, *sorted(chains, key=lambda each: len(chains[each]))]:
        owners.setdefault(_memory(each), each)
    found = {}
    for i, each in returned.items():
        owner, chain = owners[_memory(each)], chains[each]
        if owner in body.placeholders or _returned(body).index(owner) != i:
            found[i] = chain[chain.index(owner) if owner in chain else 0 :]
    return found


def _memory(node: Node) -> object:
    return storage_of(value_of(node)) or node


def _chain(node: Node) -> list[Node]:
    """Return the node, before it what it is a view of, and so on."""
    chain = [node]
    while chain[0].op == "call_function" and is_view(chain[0]):
        viewed = chain[0].args[0]
        if not isinstance(viewed, Node):
            break
        chain.insert(0, viewed)
    return chain


def _rebuilt(call: Node, around: dict[Node, Any], source: Node, views: list[Node]) -> Node:
    """Return the last of the views in the graph around, which knows their inputs."""
    given = around[source]
    with call.graph.inserting_before(call if source.op == "placeholder" else given.next):
        copy_nodes(views, call.graph, around)
    for view in views:
        args, kwargs = torch.fx.map_arg((around[view].args, around[view].kwargs), value_of)
        assert callable(view.target)
        around[view].meta = meta_with(view, view.target(*args, **kwargs))
    rebuilt: Node = around[views[-1]] if views else given
    return rebuilt


def _result(call: Node, i: int) -> Node:
    """Return a result of a call, directly behind it."""
    for user in call.users:
        if _is_result(user, i):
            call.append(user)
            return user
    with call.graph.inserting_before(call.next):
        result = call.graph.call_function(operator.getitem, (call, i))
    result.meta = meta_with(call, value_of(call)[i])
    return result


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
