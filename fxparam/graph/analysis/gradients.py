"""Which values of a graph a gradient may come back to."""

from __future__ import annotations

import itertools

import torch
from torch.fx import Graph, Node

from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.modes import grad_may_be_enabled
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["DETACHES", "ends_reached", "is_tracked", "reached_by_gradients"]

DETACHES = {"detach", torch.detach, torch.ops.aten.detach.default}


def reached_by_gradients(graph: Graph, table: EffectTable) -> set[Node]:
    """Return the nodes from which a result, or an effect, is computed differentiably.

    A value that is read under ``detach()`` or ``no_grad()`` alone is not among them: it has no
    gradient, which is another thing than a gradient of zeros where a derivative is infinite.
    Metadata do not tell: values under ``vmap`` say that they ask for no gradient.
    """
    return set(ends_reached(graph, table))


def ends_reached(graph: Graph, table: EffectTable) -> dict[Node, int]:
    """For each node, return which ends of a graph a gradient may come from to its value.

    The ends are the results, each by itself, and effects: a set of them as the bits of a number.
    Nodes from which none does are left out. Two values with different ends are two: if the caller
    differentiates one result alone, one value has a gradient and the other none.
    """
    found: dict[Node, int] = {}
    bits = (1 << i for i in itertools.count())
    for node in reversed(graph.nodes):
        if node.op == "output":
            found.update((read, found.get(read, 0) | next(bits)) for read in node.all_input_nodes)
            continue
        is_end = not node.users and node.op.startswith("call")
        ends = next(bits) if is_end else found.get(node, 0)
        if ends and not _stops_gradients(node, table):
            found.update((read, found.get(read, 0) | ends) for read in node.all_input_nodes)
    return found


def _stops_gradients(node: Node, table: EffectTable) -> bool:
    if node.target in DETACHES:
        return True
    tensors = tensors_in(value_of(node))
    whole = not any(t.is_floating_point() or t.is_complex() for t in tensors)
    off = node in table.of and not grad_may_be_enabled(table.of[node].modes)
    return off or bool(tensors) and whole


def is_tracked(node: Node) -> bool:
    """Check whether autograd may record what is computed from a node's value."""
    value = value_of(node)
    return value is None or any(t.requires_grad for t in tensors_in(value))
