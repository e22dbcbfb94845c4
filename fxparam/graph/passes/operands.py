"""The operands of calls and the placeholders of their bodies, changed together.

    y = op(body, p, q)                          y = op(body, q, w)
      body(p, q): w = f(p); g(w, q)       ->      body(q, w): g(w, q)

Between the two an operand ``w`` is added, and ``p``, which the body reads no more, is dropped. The
calls of each function here are all the calls that run their bodies, as they are at that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fxparam.graph.analysis.bodies import Call

__all__ = [
    "Operand",
    "add_operands",
    "add_placeholder",
    "drop_operands",
    "merge_operands",
    "used_operands",
]


@dataclass(frozen=True)
class Operand:
    """An operand to be added.

    Attributes:
        given: its value in each call.
        name: the name of its placeholders, which get a number behind it where it is taken.
        meta: the metadata of its placeholders.
    """

    given: Sequence[Node]
    name: str
    meta: dict[str, Any]


def add_operands(calls: Sequence[Call], added: Sequence[Operand]) -> list[list[Node]]:
    """Give calls operands, behind those that they have.

    Returns:
        For each operand, its placeholder in each of the bodies.
    """
    for i, call in enumerate(calls):
        call.set_operands([*call.operands, *(operand.given[i] for operand in added)])
    graphs = [body.module.graph for body in calls[0].bodies]
    return [[add_placeholder(graph, each.name, each.meta) for graph in graphs] for each in added]


def add_placeholder(graph: Graph, name: str, meta: dict[str, Any]) -> Node:
    """Add a placeholder to a graph, behind those that it has."""
    last = graph.find_nodes(op="placeholder")[-1:]
    with graph.inserting_after(last[0]) if last else graph.inserting_before():
        placeholder = graph.placeholder(name)
    placeholder.target = placeholder.name  # an argument's name, which must be its own
    placeholder.meta = dict(meta)
    return placeholder


def merge_operands(calls: Sequence[Call]) -> int:
    """Make operands one that are the same in each call; ops refuse operands that alias.

    Returns:
        How many operands turned out to be another one.
    """
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
    drop_operands(calls, doubled)
    return len(doubled)


def used_operands(call: Call) -> set[int]:
    """Return the indices of the operands that a body reads."""
    skip = len(call.varying)
    columns = zip(*(body.placeholders[skip:] for body in call.bodies), strict=True)
    return {i for i, column in enumerate(columns) if any(p.users for p in column)}


def drop_operands(calls: Sequence[Call], unused: Iterable[int]) -> None:
    """Take operands that no body reads from the calls and from their bodies.

    Args:
        calls: the calls.
        unused: the indices of the operands.
    """
    gone = set(unused)
    for call in calls:
        call.set_operands([v for i, v in enumerate(call.operands) if i not in gone])
    for body in calls[0].bodies:
        placeholders = body.placeholders[len(calls[0].varying) :]
        for i in gone:
            body.module.graph.erase_node(placeholders[i])
