"""Inductor overwrites results of loops, branches and regions that share memory with something else.

::

    @torch.compiler.nested_compile_region
    def activation(h, weight):
        return torch.tanh(h @ weight)       # the result, and saved for backward: one memory

    for _ in range(5):
        h = activation(h, weight) + h       # the sum is made in that memory

Inductor takes each result of a body for memory of its own, and uses it for other values once it has
no more readers. Where a body returns an operand, a view of one, or one tensor twice, that memory
belongs to something else as well, which is overwritten. The gradients are wrong altogether, without
an error. torch refuses programs that have such bodies, but makes them itself:

- In the backward of ``scan``, an operand without a gradient has a carry of zeros, which each step
  passes on.
- The forward of ``nested_compile_region`` returns views of its operands, saved for backward.
- It also returns twice what is a result and saved for backward, as that of ``tanh`` is.

Seen on 2.11.0, 2.13.0 and 2.15.0, with and without donated buffers (``donated_buffers.py``). No
upstream issue was found. The nearest is https://github.com/pytorch/pytorch/issues/195977, about a
``scan`` that is refused because it returns one tensor twice.
``tests/graph/torch_bugs/test_memory_of_results.py`` shows it.

What we do, before Inductor lowers a graph: the graph around takes such a result from where it is.
Where it cannot, the body returns a copy. ::

    result = region(h)[1]      # h.transpose(0, 1)      becomes      result = h.transpose(0, 1)
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
    """Let no body return memory that is an operand's, or another result's.

    Args:
        graph: an ATen graph, forward or backward, before Inductor lowers it.
    """
    gm = graph.owning_module
    for node in list(graph.nodes):
        call = call_of(gm, node) if gm is not None else None
        if call is not None and call.op in _BY_OP:
            _BY_OP[call.op](call)


def _of_a_loop(call: Call) -> None:
    """Replace a carry that each run passes on by what it was at first; return copies of others."""
    body = call.bodies[-1]
    first: Any = call.node.args[1 if call.op == "scan" else 2]
    for i, (source, *views) in _shown(body).items():
        if i < len(first) and source is body.placeholders[i] and not views:
            _replace_result(call.node, i, first[i])
        elif i < len(first) or source.op != "placeholder":
            _return_a_copy(body, i)


def _of_branches(call: Call) -> None:
    """Return copies: the graph around does not know which branch runs."""
    for body in call.bodies:
        for i in _shown(body):
            _return_a_copy(body, i)


def _of_a_region(call: Call) -> None:
    """Replace a result by the same views of the operand or of the other result.

    Calls of a region share its code. So whether it returns a copy depends on the body alone.
    """
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
    "switch": _of_branches,
    "invoke_subgraph": _of_a_region,
}


def _returned(body: Body) -> tuple[Any, ...]:
    returned = body.module.graph.output_node().args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _shown(body: Body) -> dict[int, list[Node]]:
    """Return the results that lie in the memory of an operand, or of another result.

    Each, by its position, comes with that operand or result, and the views that lead to it.
    """
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
    """Return the last of some views of a body, made in the graph around.

    Args:
        call: the call of the body.
        around: for nodes of the body, what they are in the graph around; the views are added.
        source: what the first of the views shows.
        views: nodes of the body.
    """
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
