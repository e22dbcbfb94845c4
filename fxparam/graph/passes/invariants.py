"""Which values of a body could be made in front of its calls, and which of them are.

A value could be made there if it is the same in each run and no rule of sharing forbids it. It is
made there if the rest of the body reads it and that saves an evaluation.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.gradients import reached_by_gradients
from fxparam.graph.analysis.nesting import Context, Level, is_run_again
from fxparam.graph.analysis.nodes import ancestors, value_of
from fxparam.graph.analysis.precision import narrowed
from fxparam.graph.passes.sites import Candidates, Sites
from fxparam.graph.rules import (
    Rule,
    do_readers_sum_in_reduced_precision,
    has_a_gradient_on_every_path,
    is_its_gradient_summed_in_reduced_precision,
    is_too_large,
    obstacle,
    runs_whenever_the_call_does,
)
from fxparam.marks import evaluation_marks, is_for_a_region_around, region_mark

__all__ = ["entering", "invariants_of"]


def invariants_of(
    level: Level, marked: Mapping[tuple[str, str], int], refusals: dict[Node, Rule]
) -> Candidates:
    """Return the nodes of a body that compute the same in each run and may run in front of it.

    Args:
        level: the body.
        marked: how many evaluations of a tensor a ``cached()`` region has, by region and list.
        refusals: takes the nodes that may not, and why.
    """
    reached = (reached_by_gradients(level.gm.graph, table) for table in level.tables)
    found = Candidates(level, differentiated=set().union(*reached), narrow=narrowed(level.gm))
    varying = len(level.live[0].call.varying)
    placeholders = [node for node in level.gm.graph.nodes if node.op == "placeholder"]
    found.invariant = set(placeholders[varying:])
    derived = level.derived
    for node in level.gm.graph.nodes:
        if node not in level.tables[0].of:
            continue  # came out of a body in this step; it may go on in the next
        if node.op == "get_attr":
            found.invariant.add(node)
        if node not in derived.candidates and node not in derived.constants:
            continue
        if not all(n in found.invariant or n in found.nodes for n in node.all_input_nodes):
            continue
        why = [
            obstacle(
                context.around,
                context.call.node,
                _from(context.inner, context.index),
                node,
                asked_for=_is_asked_for(context, node),
            )
            for context in level.live
        ]
        refused = next((rule for rule in why if rule is not None), None)
        if refused is None:
            found.nodes[node] = None
            if any(marked[m.region, m.chain] > 1 for m in evaluation_marks(node)):
                found.evaluated_again.add(node)
        elif node in derived.candidates:
            refusals[node] = refused
    return found


def _is_asked_for(context: Context, node: Node) -> bool:
    """Check whether a ``cached()`` region around the call evaluates once, whenever the call is run.

    Not so in a branch: one that is not taken evaluates nothing, and a backward that is not additive
    may make a gradient out of none.
    """
    marks = evaluation_marks(node)
    if not marks or marks[0].region != region_mark(context.call.node):
        return False
    return context.call.bodies[context.index].always


def _from(tables: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return (tables[index], *tables[:index], *tables[index + 1 :])


def entering(
    body: Candidates,
    sites: Mapping[Level, Sites],
    refusals: dict[Node, Rule],
    max_bytes: float,
) -> list[Node]:
    """Return the values that enter the body as operands.

    Args:
        body: what may run in front of it; loses nodes that would draw random numbers out of turn.
        sites: for each graph, where values are evaluated.
        refusals: takes the nodes that stay in the body, and why.
        max_bytes: a value with more bytes stays.
    """
    while True:
        found = _read_by_the_rest(body, sites, refusals, max_bytes)
        late = _drawn_out_of_turn(body, found)
        if not late:
            return found
        for node in list(body.nodes):
            if node in late or not late.isdisjoint(node.all_input_nodes):
                late.add(node)
                del body.nodes[node]


def _drawn_out_of_turn(body: Candidates, found: list[Node]) -> set[Node]:
    """Nodes that would draw random numbers before some that are drawn first, and stay."""
    moving = ancestors(found, lambda node: node in body.nodes)
    table, late, in_turn = body.level.tables[0], set(), True
    for node in body.level.gm.graph.nodes:
        if node in table.of and table.of[node].random:
            in_turn &= node in moving
            if node in moving and not in_turn:
                late.add(node)
    return late


def _read_by_the_rest(
    body: Candidates,
    sites: Mapping[Level, Sites],
    refusals: dict[Node, Rule],
    max_bytes: float,
) -> list[Node]:
    """Return the values that what stays in the body reads."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    raising = [
        _raising(body, context, numbers, sites[context.parent])
        for context, numbers in zip(body.level.live, body.numbers, strict=True)
    ]

    def require(node: Node) -> None:
        if node in seen or node not in body.nodes:
            return
        seen.add(node)
        verdict = _verdict(body, node, sites, raising, max_bytes)
        if verdict.moves:
            found[node] = None
            return
        if verdict.refused is not None and node in body.level.derived.candidates:
            refusals[node] = verdict.refused
        for argument in node.all_input_nodes:
            require(argument)

    for node in body.level.gm.graph.nodes:
        if node not in body.nodes:
            for argument in node.all_input_nodes:
                require(argument)
    return list(found)


def _raising(
    body: Candidates, context: Context, numbers: Mapping[Node, Hashable], around: Sites
) -> set[Node]:
    """Nodes that may raise, or are computed from what may, and are not evaluated anyway."""
    found: set[Node] = set()
    effects = context.inner[context.index].of
    for node in body.nodes:
        if not around.is_outside(numbers[node]) and (
            effects[node].raises or not found.isdisjoint(node.all_input_nodes)
        ):
            found.add(node)
    return found


@dataclass(frozen=True)
class _Verdict:
    """Where a value is made.

    Attributes:
        moves: in front of the call, rather than in the body.
        refused: the rule that keeps it in the body; None if it moves, or nothing is gained by it.
    """

    moves: bool
    refused: Rule | None = None


def _verdict(
    body: Candidates,
    node: Node,
    sites: Mapping[Level, Sites],
    raising: list[set[Node]],
    max_bytes: float,
) -> _Verdict:
    """Decide where a value is made that could be made in front of the call."""
    if not _is_worth_an_operand(body.level, node):
        return _Verdict(moves=False)
    places = zip(body.level.live, body.numbers, raising, strict=True)
    for context, numbers, raises in places:
        around = sites[context.parent]
        refused = _refusal_of_call(context, node, numbers[node], around, raises=node in raises)
        if refused is not None:
            return _Verdict(moves=False, refused=refused)
    narrow = node in body.narrow and not is_for_a_region_around(node)  # whose readers share it
    if do_readers_sum_in_reduced_precision(narrow=narrow, apart=True):
        return _Verdict(moves=False, refused=Rule.REDUCED)
    if not _is_made_again(body, node, sites):
        return _Verdict(moves=False, refused=Rule.ONE_USE)
    if is_too_large(node, max_bytes):
        return _Verdict(moves=False, refused=Rule.TOO_LARGE)
    return _Verdict(moves=True)


def _is_worth_an_operand(level: Level, node: Node) -> bool:
    """Check whether a value is a computed tensor.

    Numbers, tuples and views cost nothing, and a constant goes where what is computed from it goes.
    """
    derived = level.derived
    is_tensor = isinstance(value_of(node), torch.Tensor)
    computed = node in derived.candidates and node not in derived.constants
    return is_tensor and computed and not _is_view(level.tables[0], node)


def _refusal_of_call(
    context: Context, node: Node, number: Hashable, around: Sites, *, raises: bool
) -> Rule | None:
    """Return the rule that forbids to make a value in front of one call."""
    if not runs_whenever_the_call_does(
        raises=raises,
        always=context.call.bodies[context.index].always,
        branch=context.call.branches,
        on_every_path=around.is_outside(number) or around.on_every_path(number, context),
    ):
        return Rule.MAY_NOT_RUN
    if context.call.branches and value_of(node).requires_grad:
        paths = around.gradients(number, context)
        outside = around.has_a_gradient_outside(number, context)
        if not has_a_gradient_on_every_path(paths, outside=outside):
            return Rule.NO_GRADIENT
    if context.call.loops and is_its_gradient_summed_in_reduced_precision(node):
        return Rule.REDUCED
    return None


def _is_made_again(body: Candidates, node: Node, sites: Mapping[Level, Sites]) -> bool:
    """Check whether one value in front of the calls serves more than one evaluation."""
    if node in body.evaluated_again or is_for_a_region_around(node):
        return True
    pairs = zip(body.level.live, body.numbers, strict=True)
    repeated = any(sites[c.parent].is_repeated(numbers[node]) for c, numbers in pairs)
    return repeated or is_run_again(body.level, [node])


def _is_view(table: EffectTable, node: Node) -> bool:
    """Check whether the value shows memory of an input of the op that it is a result of."""
    op = node.args[0] if node.target is operator.getitem else node
    if not isinstance(op, Node) or isinstance(value_of(op), torch.Tensor):
        op = node
    return bool(table.of[node].storages & table.of[op].reads)
