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
    stacks = [stack for n in gm.graph.nodes if (stack := n.meta.get("nn_module_stack"))]
    root = dict(list(stacks[0].items())[:1]) if stacks else {}
    _place_before_users(gm, set(lifted))
    at_front = set(lifted)
    runs = Counter(
        site for (site, _), _ in groupby((owner(n), n in at_front) for n in gm.graph.nodes)
    )
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


def _place_before_users(gm: GraphModule, at_front: set[Node]) -> None:
    """Give nodes out of a body, which non-strict export gives no stack, that of what follows."""
    following: dict[str, object] = {}
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        stack = node.meta.get("nn_module_stack")
        if not stack and node not in at_front and following:
            node.meta["nn_module_stack"] = dict(following)
        following = stack or following
