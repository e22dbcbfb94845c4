"""A gathered value that is written, or leaves the graph, is copied, so that its gather is shared.

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
        for node in list(level.gm.graph.nodes):
            if (
                node in level.derived.candidates
                and gives_what_ranks_have(node)
                and not evaluation_marks(node)  # the values of a region are told apart there
                and level.tables
                and all(_may_be_copied(table, node) for table in level.tables)
                and any(_is_kept_apart(table, node) for table in level.tables)
            ):
                _copy(node)
                changed.add(level.gm)
    return changed


def _may_be_copied(table: EffectTable, node: Node) -> bool:
    """Check that all who reach the memory of a node reach it by the node.

    What made it did so step by step, and nobody else reads a step: a write there would be missing
    in the copy, and a write to the copy would be missing there. An input's memory is the caller's.
    """
    if node not in table.of:
        return False
    memory = table.of[node].storages
    if any(
        table.of[n].storages & memory and gives_what_ranks_have(n)
        for n in node.users
        if n in table.of
    ):
        return False  # a later step is the one to copy
    while True:
        steps = [n for n in node.all_input_nodes if table.of[n].storages & memory]
        if not steps:
            return True
        (before, *others) = steps
        if others or not before.op.startswith("call") or {*before.users} != {node}:
            return False
        node = before


def _is_kept_apart(table: EffectTable, node: Node) -> bool:
    return does_the_value_escape(table, node, node) or is_the_value_written(table, node, node)


def _copy(node: Node) -> None:
    """Let all readers of a node read a copy."""
    with node.graph.inserting_after(node):
        copied = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = meta_with(node, value_of(node).clone())
    node.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
