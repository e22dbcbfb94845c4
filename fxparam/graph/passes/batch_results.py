"""Batches in a graph whose results are evaluations, as a scope has them computed.

    return exp(p0), exp(p1)     ->      v0, v1 = unbind(exp(stack(p0, p1)))
                                        return clone(v0), clone(v1)

Readers tell results apart, as they may write one: each is copied out of the batch. Without a batch
nothing is copied. A reader may also differentiate one result alone. The others have gradients of
zeros then, which ``fxparam.scopes.partial_gradients`` drops, if the inner backend makes one node of
autograd of the graph.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.nodes import meta_with, value_of
from fxparam.graph.passes.batch import Batching, batch
from fxparam.marks import unmarked

__all__ = ["batch_results"]


def batch_results(
    gm: GraphModule, *, grad_enabled: bool, max_bytes: float, lowered: bool
) -> Batching:
    """Run the same evaluations of different tensors as one, in a graph that returns their values.

    Args:
        gm: a graph of Dynamo's, of which nothing is left but evaluations; changed in place.
        grad_enabled, max_bytes, lowered: as for ``batch``.
    """
    for node in gm.graph.nodes:
        node.meta = unmarked(node.meta)
    before = {*gm.graph.nodes}
    found = batch(
        gm, grad_enabled=grad_enabled, max_bytes=max_bytes, lowered=lowered, own_results=False
    )
    if found.modified:
        output = gm.graph.output_node()
        copies = {n: n if n in before else _copy(n, output) for n in output.all_input_nodes}
        output.args = torch.fx.map_arg(output.args, copies.__getitem__)
        gm.recompile()
    return found


def _copy(node: Node, output: Node) -> Node:
    """Return a copy of a result, in front of the output."""
    with output.graph.inserting_before(output):
        copied = output.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = meta_with(node, value_of(node).clone())
    return copied
