"""When two accesses may share one value: six rules, each asked by predicates read as questions.

1. They are the same function of the same tensors, forward and backward. Value numbering finds what
   is the same forward (``analysis/numbering.py``). Backward is asked by
   ``has_one_backward_for_all``, ``may_a_gradient_be_taken``,
   ``do_readers_sum_in_reduced_precision`` and ``is_its_gradient_summed_in_reduced_precision`` (in a
   loop).
2. No original, and no buffer that the evaluation reads, is written between the two: asked by
   ``is_an_input_written_between``, ``is_an_input_written_inside`` (a loop's body) and
   ``is_an_input_written_around`` (what backward runs again).
3. Nobody writes to the value while another still reads it: asked by ``is_the_value_written``,
   ``does_the_value_escape``, ``is_the_value_written_inside`` and ``does_the_value_leave_the_body``.
4. Both run under the same modes: asked by ``runs_under_the_same_modes`` and
   ``runs_under_the_modes_of_the_call``.
5. The evaluation writes nothing and draws no random numbers: asked by ``has_effects``.
6. An evaluation that leaves a body is run whenever the program would have run it, or does no harm
   where it would not: asked by ``runs_whenever_the_call_does`` and
   ``has_a_gradient_on_every_path``.

``refusal`` asks them of two nodes of one graph, ``obstacle`` of a node in a body and a place in
front of the call that runs the body. Both answer with the :class:`Rule` that forbids it, or None.
Whether sharing is worthwhile is another question, asked at the end of this file.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch.fx import Node

from fxparam.graph.analysis.additive import is_backward_additive
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.gradients import is_tracked
from fxparam.graph.analysis.modes import grad_may_be_enabled
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["Rule", "obstacle", "refusal"]


class Rule(enum.Enum):
    """Why an evaluation is not shared.

    The value says why, in words for a report.

    Attributes:
        number: which of the six rules forbids it; None where sharing is legal and not worthwhile.
    """

    NOT_ADDITIVE = 1, "a custom backward is not known to be additive in the gradient"
    DIFFERENTIATED = 1, "the graph itself takes gradients of what is computed from it"
    REDUCED = 1, "its gradient would be summed in reduced precision"
    ORIGINAL_WRITTEN = 2, "an original is written between the two accesses"
    WRITTEN_AROUND = 2, "an original is written in the graph, and backward may evaluate again"
    VALUE_WRITTEN = 3, "the value is written in place"
    VALUE_ESCAPES = 3, "the value leaves the graph, where it may be written in place"
    MODES_DIFFER = 4, "grad, autocast or functorch modes differ"
    RANDOM = 5, "the evaluation draws random numbers"
    WRITES = 5, "the evaluation writes in place"
    UNKNOWN = 5, "the effects of an operation are not known"
    MAY_NOT_RUN = 6, "the body may not run, and the program would not have evaluated it"
    NO_GRADIENT = 6, "the branch taken may give it no gradient, which is not one of zeros"
    TOO_LARGE = None, "the value has more than max_bytes bytes"
    ONE_USE = None, "nothing else uses the value, and the body runs once"

    number: int | None
    _value_: str

    def __new__(cls, number: int | None, why: str) -> Rule:
        """Make a member whose value is ``why``."""
        rule = object.__new__(cls)
        rule._value_, rule.number = why, number
        return rule

    def __str__(self) -> str:
        rule = "not worthwhile" if self.number is None else f"rule {self.number}"
        return f"{rule}, {self.value}"


def refusal(
    table: EffectTable, first: Node, again: Node, max_bytes: float = float("inf")
) -> Rule | None:
    """Return the rule that forbids ``again`` to use the value of ``first``, which runs first."""
    impure = has_effects(table, again)
    if impure is not None:
        return impure
    if not has_one_backward_for_all(table, again):
        return Rule.NOT_ADDITIVE
    if may_a_gradient_be_taken(table, again):
        return Rule.DIFFERENTIATED
    if not runs_under_the_same_modes(table, first, again):
        return Rule.MODES_DIFFER
    if is_an_input_written_between(table, first, again):
        return Rule.ORIGINAL_WRITTEN
    if is_the_value_written(table, first, again):
        return Rule.VALUE_WRITTEN
    if does_the_value_escape(table, first, again):
        return Rule.VALUE_ESCAPES
    if is_too_large(first, max_bytes):
        return Rule.TOO_LARGE
    return None


def obstacle(
    around: Sequence[EffectTable],
    call: Node,
    inner: Sequence[EffectTable],
    node: Node,
    *,
    asked_for: bool = False,
) -> Rule | None:
    """Return the rule that forbids to evaluate a body's node in front of the body's call.

    Args:
        around: the effects of the graph that has the call, and of those around it, in that order.
        call: the call.
        inner: the effects of the bodies, those of the body with the node first.
        node: the node.
        asked_for: a ``cached()`` region around the call evaluates once, in eager code as well,
            and draws random numbers once.
    """
    table = inner[0]
    impure = has_effects(table, node)
    if impure is not None and not (impure is Rule.RANDOM and asked_for):
        return impure
    if not (asked_for or has_one_backward_for_all(table, node)):
        return Rule.NOT_ADDITIVE
    if any(may_a_gradient_be_taken(each, node) for each in (*inner, *around)):
        return Rule.DIFFERENTIATED
    if not runs_under_the_modes_of_the_call(around[0], call, table, node):
        return Rule.MODES_DIFFER
    if any(is_an_input_written_inside(body, table, node) for body in inner):
        return Rule.ORIGINAL_WRITTEN
    if any(is_an_input_written_around(outer, table, node) for outer in around):
        return Rule.WRITTEN_AROUND
    if any(is_the_value_written_inside(body, table, node) for body in inner):
        return Rule.VALUE_WRITTEN
    if does_the_value_leave_the_body(table, node):
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


def has_one_backward_for_all(table: EffectTable, node: Node) -> bool:
    """Rule 1 for backward: is the backward of a sum of gradients the sum of their backwards?"""
    return not grad_may_be_enabled(table.of[node].modes) or is_backward_additive(node)


def may_a_gradient_be_taken(table: EffectTable, node: Node) -> bool:
    """Rule 1 for autograd in the graph: the gradient of one access is not that of all of them.

    Nor can autograd go twice through one evaluation, of which it frees what was saved.
    """
    return is_tracked(node) and bool(table.takes_gradients)


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


def is_an_input_written_inside(body: EffectTable, table: EffectTable, node: Node) -> bool:
    """Rule 2 for a loop: a later run of the body would read what an earlier one wrote."""
    return body.written(table.of[node].reads)


def is_an_input_written_around(outer: EffectTable, table: EffectTable, node: Node) -> bool:
    """Rule 2 for what backward runs again: would it read something else then?

    A checkpointed region is run again in backward, in eager code too, and reads originals as they
    are by then; outside the region the value would be the one of forward. And a partitioner may
    recompute in backward, from an input that the graph overwrites, what it cannot recompute while
    it is in a body (``torch_bugs/recomputed_values.py``).
    """
    return outer.written(table.of[node].reads)


def is_the_value_written_inside(body: EffectTable, table: EffectTable, node: Node) -> bool:
    """Rule 3 for a loop: a later run of the body would find the value changed."""
    return body.written(table.of[node].storages)


def runs_under_the_modes_of_the_call(
    outer: EffectTable, call: Node, table: EffectTable, node: Node
) -> bool:
    """Rule 4 for a body."""
    return table.of[node].modes == outer.of[call].modes


def does_the_value_leave_the_body(table: EffectTable, node: Node) -> bool:
    """Rule 3 for a body: each run returned a tensor of its own, which the caller may write to."""
    return bool(table.of[node].storages & table.escaping)


def runs_whenever_the_call_does(
    *, raises: bool, always: bool, branch: bool, on_every_path: bool
) -> bool:
    """Rule 6: is the evaluation run anyway, or does it do no harm where it is not?

    An evaluation without effects that cannot raise does no harm in front of a loop that runs zero
    times. In front of a branch it is work that the other branch would not have done.

    Args:
        raises: the value, or one that would be made with it, may raise depending on the data.
        always: the body runs at least once.
        branch: the body is one of several, of which one runs.
        on_every_path: the value is also evaluated in the other bodies, or outside.
    """
    if always or on_every_path:
        return True
    return not branch and not raises


def has_a_gradient_on_every_path(paths: Sequence[bool], *, outside: bool) -> bool:
    """Rule 6 for backward: does whichever branch is taken give the value a gradient, or none?

    In front of a branch, a value that the branch taken does not differentiate gets a gradient of
    zeros where the program gives it none. Zero times an infinite derivative is not zero.

    Args:
        paths: for each branch, whether a gradient comes back from it.
        outside: whether one comes back from outside of the branches.
    """
    return outside or all(paths) or not any(paths)


def is_too_large(node: Node, max_bytes: float) -> bool:
    """Does the value have more bytes than one shared value may have?"""
    if max_bytes == float("inf"):
        return False
    return sum(t.numel() * t.element_size() for t in tensors_in(value_of(node))) > max_bytes


def do_readers_sum_in_reduced_precision(*, narrow: bool, apart: bool) -> bool:
    """Rule 1 for backward: would gradients be summed in fewer bits than an original has?

    In float16 such a sum may be infinite where each term is not. What the value is computed from in
    full precision is shared all the same, and each reader has the cast to itself.

    Args:
        narrow: the value has fewer bits than what it is computed from.
        apart: its readers are not shared with it, so that it is where their gradients meet.
    """
    return narrow and apart


def is_its_gradient_summed_in_reduced_precision(node: Node) -> bool:
    """Would a loop sum the value's gradient, step by step, in bfloat16 or float16?

    Evaluated in the body, the value has a gradient in each step. It goes on to the originals, and
    the steps are summed there, in the originals' precision. Evaluated in front of the loop, the
    value has one gradient: the sum over the steps, rounded in each to the value's precision. What
    the value is computed from in full precision is moved out all the same.
    """
    value = value_of(node)
    return value.dtype in (torch.bfloat16, torch.float16) and bool(value.requires_grad)
