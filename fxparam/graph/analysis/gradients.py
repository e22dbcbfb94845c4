"""Which values of a graph a gradient may come back to."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.modes import grad_may_be_enabled
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["DETACHES", "is_tracked", "reached_by_gradients"]

DETACHES = {"detach", torch.detach, torch.ops.aten.detach.default}


def reached_by_gradients(graph: Graph, table: EffectTable) -> set[Node]:
    """Return the nodes from which a result, or an effect, is computed differentiably.

    A value that is read under ``detach()`` or ``no_grad()`` alone is not among them: it has no
    gradient, which is another thing than a gradient of zeros where a derivative is infinite.
    Metadata do not tell: values under ``vmap`` say that they ask for no gradient.
    """
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        ends = node.op == "output" or not node.users and node.op.startswith("call")
        if (ends or node in found) and not _stops_gradients(node, table):
            found.update(node.all_input_nodes)
    return found


def _stops_gradients(node: Node, table: EffectTable) -> bool:
    if node.op == "output":
        return False
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
