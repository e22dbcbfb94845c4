"""Views in evaluations that show the whole of their argument as it is.

    a = flatten(p); b = flatten(a)        a = p; b = p

``flatten`` of a matrix returns its argument, the same tensor, and a tracer that knows tensors by
identity takes the second evaluation to start from the value of the first. Numbered as they are, the
two would not be the same function of the same tensors.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.tensors import geometry
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.gradients import DETACHES
from fxparam.graph.analysis.nodes import owner, value_of

__all__ = ["drop_identities"]


def drop_identities(gm: GraphModule) -> None:
    """Use the argument in place of a view of all of it, in the evaluations of an ATen graph."""
    table = analyze(gm)
    for node in list(gm.graph.nodes):
        if owner(node) is None or len(node.all_input_nodes) != 1 or node.target in DETACHES:
            continue  # a detach is no identity in backward, of which export's metadata say nothing
        argument = node.all_input_nodes[0]
        effects, source = table.of[node], table.of[argument]
        same_memory = effects.pure and effects.values == source.values
        is_whole = same_memory and _geometry(node) == _geometry(argument) is not None
        if is_whole and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(argument)
            gm.graph.erase_node(node)


def _geometry(node: Node) -> object:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    return (*geometry(value), value.is_conj(), value.is_neg(), value.requires_grad)
