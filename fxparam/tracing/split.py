"""A graph in two: what parameters and buffers alone decide, and the rest."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fxparam._torch.fx import copy_nodes
from fxparam.eager.describe import check_kind
from fxparam.graph.passes.prologue import prologue_of, subgraph

__all__ = ["split"]

_WAY_OUT = "fxparam.symbolic_trace makes one; an exported program has one, its graph_module."


def split(gm: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Split a graph into a prologue, to be run once, and a body, to be run many times.

    ``body(*prologue(), *inputs)`` is ``gm(*inputs)``. The prologue depends on parameters and
    buffers alone; its values hold until one of them is written. What depends on a tensor that the
    graph itself writes, draws random numbers or is returned by the graph is left in the body.

    Args:
        gm: a hoisted graph with flat inputs, as :func:`fxparam.symbolic_trace` makes it; not
            changed. Parameters and buffers that are inputs of the graph are inputs of the prologue.

    Returns:
        Two graph modules on the same parameters and buffers: the prologue, which returns a tuple,
        and the body, which takes the values of the prologue in front of the inputs of ``gm``.

    Raises:
        TypeError: ``gm`` is no graph module.

    Source: ``tvm.relax.transform.LiftTransformParams``, for the idea.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
        >>> prologue, body = fxparam.split(fxparam.symbolic_trace(layer))
        >>> values = prologue()
        >>> [tuple(value.shape) for value in values]
        [(3, 2)]
        >>> x = torch.ones(4, 2)
        >>> torch.equal(body(*values, x), layer(x))
        True
    """
    check_kind("gm", gm, GraphModule, _WAY_OUT)
    lifted = prologue_of(gm, lasting=True)
    inside = set(lifted)
    values = [node for node in lifted if any(user not in inside for user in node.users)]
    prologue = GraphModule(gm, subgraph(gm.graph, values)[0], "Prologue")
    body = GraphModule(gm, _body(gm.graph, inside, values), "Body")
    for part in (prologue, body):
        part.graph.lint()
        for name, module in part.named_modules():  # leaves are those of gm, containers new ones
            module.training = gm.get_submodule(name).training
    return prologue, body


def _body(graph: Graph, lifted: set[Node], values: list[Node]) -> Graph:
    new = Graph()
    copies: dict[Node, Node] = {}
    for node in values:
        copies[node] = new.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for_lifted = (n for n in graph.find_nodes(op="get_attr") if set(n.users) <= lifted)
    gone = lifted.union(for_lifted)
    copy_nodes((node for node in graph.nodes if node not in gone), new, copies)
    return new
