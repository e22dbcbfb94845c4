"""Operands of one call that higher-order ops do not take: they are copied.

Sharing may make two operands one: ``scan(body, f(p), xs, [f(p)])``. torch refuses that for most
ops, and for a region that several calls run it uses the graph traced for the call whose operands
are one also for those whose operands are two, with wrong results (2.13). One of the two is copied:
no evaluation, and the gradients of both are summed as before.

A value that is shared in a ``cached()`` block may be written after a branch has read it. ``cond``
and ``switch`` save all operands for backward, also those that no branch needs there, and raise
"modified by an inplace operation" then (2.11 to 2.15). Eager code saves what the branch that ran
needs. The branches read a copy, which nothing writes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.nesting import Context, Level
from fxparam.graph.analysis.nodes import meta_with, value_of

__all__ = ["copy_aliases"]


def copy_aliases(levels: list[Level]) -> set[GraphModule]:
    """Copy computed operands that alias another operand, or that are written once a branch ran.

    Args:
        levels: every graph, with its effects as they are.

    Returns:
        The graphs that were changed.
    """
    changed = set()
    contexts = {c.call.node: c for level in levels for c in level.live}
    for context in contexts.values():
        if not context.call.inlined and _copy_aliases_of(context):
            changed.add(context.parent.gm)
    return changed


def _copy_aliases_of(context: Context) -> bool:
    call, parent = context.call.node, context.parent
    computed = parent.derived.candidates
    if parent.contexts:  # what came out of a body may have come in from around
        computed |= parent.derived.nodes
    operands: list[Node] = []
    map_arg((call.args, call.kwargs), operands.append)
    # What is not computed is not copied.
    seen = [n for n in operands if isinstance(value_of(n), Tensor) and n not in computed]
    copied = False

    def separate(node: Node) -> Node:
        nonlocal copied
        if node not in computed or not isinstance(value_of(node), Tensor):
            return node
        if context.call.branches and _written_later(parent.tables, node, call):
            copied = True
            return _copy(node, call)
        if any(_aliases(table, node, seen, context.inner) for table in parent.tables):
            copied = True
            return _copy(node, call)
        seen.append(node)
        return node

    call.args = map_arg(call.args, separate)
    return copied


def _aliases(
    table: EffectTable, node: Node, others: list[Node], bodies: tuple[EffectTable, ...]
) -> bool:
    storages = table.of[node].storages
    # What the body writes is to be seen through the others. Through a result nobody can write to an
    # operand later: torch refuses bodies that return one.
    if any(body.written(storages) for body in bodies):
        return False
    return any(storages & table.of[other].storages for other in others)


def _written_later(tables: list[EffectTable], node: Node, call: Node) -> bool:
    return value_of(node).requires_grad and any(
        table.written(table.of[node].storages, after=table.position[call]) for table in tables
    )


def _copy(node: Node, call: Node) -> Node:
    with call.graph.inserting_before(call):
        copied = call.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = meta_with(node, value_of(node).clone())
    return copied
