"""What a collective gives is copied where it is written, or leaves the graph.

    w = wait(gather(p)); log = w.detach()    ->    w = clone(wait(gather(p))); log = w.detach()

Such a value is not shared (rule 3), and its collective would run at each access on the ranks that
keep it, and once on those that do not: all would wait for ever. The copy is not shared, and the
collective is.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.collectives import gives_what_ranks_have
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.nesting import Level
from fxparam.graph.analysis.nodes import meta_with, value_of
from fxparam.graph.rules import does_the_value_escape, is_the_value_written
from fxparam.marks import evaluation_marks

__all__ = ["copy_gathered"]


def copy_gathered(levels: list[Level]) -> set[GraphModule]:
    """Copy what collectives of parameters give, where rule 3 would keep it apart.

    Args:
        levels: every graph, with its effects as they are.

    Returns:
        The graphs that were changed.
    """
    changed = set()
    for level in levels:
        last = dict[frozenset[int], Node]()  # of the nodes that show one memory
        for node in level.gm.graph.nodes:
            if (
                node in level.derived.candidates
                and gives_what_ranks_have(node)
                and not evaluation_marks(node)  # the values of a region are told apart there
                and all(node in table.of for table in level.tables)
                and level.tables
            ):
                last[level.tables[0].of[node].storages] = node
        for node in last.values():
            if any(_is_kept_apart(table, node) for table in level.tables):
                _copy(node)
                changed.add(level.gm)
    return changed


def _is_kept_apart(table: EffectTable, node: Node) -> bool:
    return does_the_value_escape(table, node, node) or is_the_value_written(table, node, node)


def _copy(node: Node) -> None:
    """Let all readers of a node read a copy."""
    with node.graph.inserting_after(node):
        copied = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = meta_with(node, value_of(node).clone())
    node.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
