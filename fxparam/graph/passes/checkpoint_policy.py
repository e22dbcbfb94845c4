"""What was moved out of a checkpointed region keeps the region's policy.

A checkpoint without a policy saves what enters the region, hence also a value that was moved in
front of it: one value, as if the source had been hoisted by hand. With a policy (selective
checkpointing) it is the policy that says what is recomputed in backward, and what was moved refused
under it: the operations are put into a checkpointed region of their own.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fxparam._torch.fx import copy_nodes, hold
from fxparam.graph.analysis.bodies import Call
from fxparam.graph.analysis.nodes import value_of
from fxparam.graph.passes.operands import add_placeholder

__all__ = ["is_recomputed", "recompute_as_before"]

_POLICY = "_checkpoint_context_fn"  # where Dynamo leaves context_fn, and the op looks for it
_MOVED = "fxparam.moved"


def is_recomputed(body: GraphModule) -> bool:
    """Check whether a body is one that ``recompute_as_before`` made, out of which nothing moves."""
    return _MOVED in body.meta


def recompute_as_before(
    call: Call, body: GraphModule, wanted: list[Node], copies: dict[Node, Any]
) -> None:
    """Wrap the copies of a region's nodes in a region with the same policy, if it has one.

    Args:
        call: the checkpointed call, in front of which the copies are.
        body: the region.
        wanted: the nodes of the region whose values leave it.
        copies: their copies, and those of what they need; on return, of ``wanted``, the values that
            come out of the new region.
    """
    if _POLICY not in body.meta or not wanted:
        return
    gm: Any = call.node.graph.owning_module
    op: Any = call.node.target
    inside = [n for n in body.graph.nodes if n.op in ("call_function", "call_method")]
    moved = [copies[node] for node in inside if node in copies]
    values = [copies[node] for node in wanted]
    region, operands = _region_of(gm, moved, values)
    region.meta = {_POLICY: body.meta[_POLICY], _MOVED: True}
    with call.node.graph.inserting_before(call.node):
        target = call.node.graph.get_attr(hold(gm, "moved_region", region))
        made = call.node.graph.call_function(op, (target, *operands), dict(call.node.kwargs))
        example = tuple(value_of(value) for value in values)
        made.meta = {**call.node.meta, "example_value": example}
        for i, (node, value) in enumerate(zip(wanted, values, strict=True)):
            copies[node] = call.node.graph.call_function(operator.getitem, (made, i))
            copies[node].meta = dict(value.meta)
    bodies = [a for node in moved for a in node.all_input_nodes if a.op == "get_attr"]
    for node in (*reversed(moved), *dict.fromkeys(bodies)):
        call.node.graph.erase_node(node)


def _region_of(
    gm: GraphModule, nodes: list[Node], values: list[Node]
) -> tuple[GraphModule, list[Node]]:
    """Return a body that runs copies of some nodes and returns values, and what it is to be given.

    Args:
        gm: the module of the nodes' graph.
        nodes: the nodes, in order.
        values: those of them that the body returns.
    """
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
    graph, inside = Graph(), set(nodes)
    operands = [n for n in read if n not in inside and n.op != "get_attr"]
    copies = {n: add_placeholder(graph, n.name, n.meta) for n in operands}
    bodies = (n for n in read if n.op == "get_attr")  # of autograd.Functions
    copy_nodes((*bodies, *nodes), graph, copies)
    graph.output(tuple(copies[value] for value in values))
    return GraphModule(gm, graph), operands
