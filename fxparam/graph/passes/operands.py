"""The operands of calls and the placeholders of their bodies, changed together."""

from __future__ import annotations

from torch.fx import Node

from fxparam.graph.analysis.nesting import Context

__all__ = [
    "drop_operands",
    "merge_operands",
    "used_operands",
]


def merge_operands(contexts: list[Context]) -> int:
    """Make operands one that are the same in each call; ops refuse operands that alias."""
    calls = [context.current for context in contexts]
    seats: dict[tuple[int, ...], int] = {}
    doubled: dict[int, int] = {}
    for i, column in enumerate(zip(*(call.operands for call in calls), strict=True)):
        if all(isinstance(value, Node) for value in column):
            first = seats.setdefault(tuple(map(id, column)), i)
            if first != i:
                doubled[i] = first
    if not doubled:
        return 0
    skip = len(calls[0].varying)
    for body in calls[0].bodies:
        placeholders = body.placeholders[skip:]
        for i, first in doubled.items():
            placeholders[i].replace_all_uses_with(placeholders[first])
    drop_operands(contexts, set(doubled))
    return len(doubled)


def used_operands(context: Context) -> set[int]:
    """Indices of the operands that a body reads."""
    call = context.current
    skip = len(call.varying)
    columns = zip(*(body.placeholders[skip:] for body in call.bodies), strict=True)
    return {i for i, column in enumerate(columns) if any(p.users for p in column)}


def drop_operands(contexts: list[Context], unused: set[int]) -> None:
    """Take operands that nothing reads any more from the calls and from their bodies."""
    bodies = contexts[0].current.bodies
    for context in contexts:
        call = context.current
        call.set_operands([v for i, v in enumerate(call.operands) if i not in unused])
    skip = len(contexts[0].call.varying)
    for body in bodies:
        for i, placeholder in enumerate(body.placeholders[skip:]):
            if i in unused:
                body.module.graph.erase_node(placeholder)
