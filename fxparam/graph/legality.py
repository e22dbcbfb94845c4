"""When two accesses may share one value: the rules, each a predicate that reads as a question.

``refusal`` asks them in order. It is given two nodes that compute the same function of the same
inputs (rule 1: that is what value numbering found) and answers with the first rule that forbids
the later one to use the value of the earlier one, or None.
"""

from __future__ import annotations

import enum

from torch.fx import Node

from fxparam.graph.effects import EffectTable

__all__ = ["Rule", "refusal"]


class Rule(enum.Enum):
    """Why an evaluation is kept."""

    ORIGINAL_WRITTEN = "an original is written between the two accesses (rule 2)"
    VALUE_WRITTEN = "the value is written in place (rule 3)"
    VALUE_ESCAPES = "the value leaves the graph, where it may be written in place (rule 3)"
    MODES_DIFFER = "grad, autocast or functorch modes differ (rule 4)"
    RANDOM = "the evaluation draws random numbers (rule 5)"
    WRITES = "the evaluation writes in place (rule 5)"
    UNKNOWN = "the effects of an operation are not known (rule 5)"


def refusal(table: EffectTable, first: Node, again: Node) -> Rule | None:
    """The rule that forbids ``again`` to use the value of ``first``, which runs before it."""
    impure = has_effects(table, again)
    if impure is not None:
        return impure
    if not runs_under_the_same_modes(table, first, again):
        return Rule.MODES_DIFFER
    if is_an_input_written_between(table, first, again):
        return Rule.ORIGINAL_WRITTEN
    if is_the_value_written(table, first, again):
        return Rule.VALUE_WRITTEN
    if does_the_value_escape(table, first, again):
        return Rule.VALUE_ESCAPES
    return None


def has_effects(table: EffectTable, node: Node) -> Rule | None:
    """Rule 5, for one node: does it write, draw, or do what cannot be seen?"""
    effects = table.of[node]
    if not effects.known:
        return Rule.UNKNOWN
    if effects.writes or effects.writes_all:
        return Rule.WRITES
    return Rule.RANDOM if effects.random else None


def runs_under_the_same_modes(table: EffectTable, first: Node, again: Node) -> bool:
    """Rule 4."""
    return table.of[first].modes == table.of[again].modes


def is_an_input_written_between(table: EffectTable, first: Node, again: Node) -> bool:
    """Rule 2, for one node: by storage, so through views and aliases too."""
    reads = table.of[first].reads | table.of[again].reads
    return table.written(reads, table.position[first], table.position[again])


def is_the_value_written(table: EffectTable, first: Node, again: Node) -> bool:
    """Rule 3 inside the graph: does anyone write to the value once it is there?"""
    values = table.of[first].storages | table.of[again].storages
    return table.written(values, table.position[first])


def does_the_value_escape(table: EffectTable, first: Node, again: Node) -> bool:
    """Rule 3 outside the graph: could the caller write to the value, or hang hooks on it?

    A write by the caller would reach what the other access saved for backward. A view of an
    input that escapes counts as well: the two were two tensor objects.
    """
    values = table.of[first].values + table.of[again].values
    return any(value & table.escaping for value in values)
