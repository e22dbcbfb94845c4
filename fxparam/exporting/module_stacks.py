"""The module stacks of nodes that were moved to the front of an exported program.

``torch.export.unflatten`` cuts a program into modules by the module stacks of its nodes, and takes
nodes of one call of a module that stand apart for several calls. What stands in front is called by
the root: as the evaluation it is, without the module around that owns the tensor, or, if not all
nodes of the evaluation are there, one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from itertools import groupby

from torch.fx import GraphModule, Node

from fxparam.graph.analysis.nodes import modules_around, owner

__all__ = ["call_from_root", "place_before_users"]


def call_from_root(gm: GraphModule, lifted: list[Node]) -> None:
    """Give nodes at the front the module stacks of calls by the root.

    Args:
        gm: a graph that export captured.
        lifted: its prologue, as :func:`fxparam.graph.prologue.lift` returns it.
    """
    at_front = set(lifted)
    stacks = [stack for n in gm.graph.nodes if (stack := n.meta.get("nn_module_stack"))]
    root = dict(list(stacks[0].items())[:1]) if stacks else {}
    place_before_users(gm, at_front)
    runs = Counter(
        site for (site, _), _ in groupby((owner(n), n in at_front) for n in gm.graph.nodes)
    )
    for node in lifted:
        site = owner(node)
        if site is None or runs[site] > 1:
            modules = root
        else:
            outside, stack = modules_around(node), node.meta["nn_module_stack"]
            modules = {**root, **{k: v for k, v in stack.items() if k not in outside}}
        # Export lets what a block gives have the metadata of what is returned in it.
        node.meta = {**node.meta, "nn_module_stack": modules}


def place_before_users(gm: GraphModule, at_front: Container[Node] = ()) -> None:
    """Give each node without a module stack the stack of the node that follows it.

    Args:
        gm: a graph that export captured.
        at_front: nodes that are not asked about.
    """
    following: dict[str, object] = {}
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        stack = node.meta.get("nn_module_stack")
        if not stack and node not in at_front and following:
            node.meta = {**node.meta, "nn_module_stack": dict(following)}
        following = stack or following
