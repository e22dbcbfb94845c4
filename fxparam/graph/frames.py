"""The module stacks of nodes that were moved to the front of an exported program.

``torch.export.unflatten`` cuts a program into modules by the module stacks of its nodes, and takes
nodes of one call of a module that stand apart for several calls. What stands in front is called by
the root: as the evaluation it is, without the module around that owns the tensor, or, if not all
nodes of the evaluation are there, one by one.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from torch.fx import GraphModule, Node

from fxparam.graph.evaluations import modules_around, owner

__all__ = ["call_from_root"]


def call_from_root(gm: GraphModule, lifted: list[Node]) -> None:
    """Give nodes at the front the module stacks of calls by the root.

    Args:
        gm: a graph that export captured.
        lifted: its prologue, as :func:`fxparam.graph.prologue.lift` returns it.
    """
    stacks = [
        node.meta["nn_module_stack"] for node in gm.graph.nodes if "nn_module_stack" in node.meta
    ]
    root = dict(list(stacks[0].items())[:1]) if stacks else {}
    runs = Counter(site for site, _ in groupby(map(owner, gm.graph.nodes)))
    for node in lifted:
        site = owner(node)
        if site is None or runs[site] > 1:
            node.meta["nn_module_stack"] = root
            continue
        outside = modules_around(node)
        stack = node.meta["nn_module_stack"]
        node.meta["nn_module_stack"] = {
            **root,
            **{k: v for k, v in stack.items() if k not in outside},
        }
