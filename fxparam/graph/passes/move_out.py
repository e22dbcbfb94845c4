"""Code motion: an evaluation in a body is made before the call, and enters the body as an operand.

    h, _ = scan(body, h, xs, [p])          w = f(p)
      body(h, x, p): w = f(p); ...    ->   h, _ = scan(body, h, xs, [w])
                                             body(h, x, w): ...

One step moves values from each body to the graph that runs it; repeated, they come as far out as is
right. What moves are the values that the rest of the body reads. A view is not moved: it costs
nothing, and an operand that aliases another is more than most ops accept; what it is a view of
moves instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from fxparam._torch.fx import copy_nodes
from fxparam.graph.analysis.bodies import Call
from fxparam.graph.analysis.nesting import Context, Level
from fxparam.graph.analysis.nodes import ancestors, meta_with, owner, value_of
from fxparam.graph.passes.checkpoint_policy import is_recomputed, recompute_as_before
from fxparam.graph.passes.invariants import entering, invariants_of
from fxparam.graph.passes.operands import (
    Operand,
    add_operands,
    drop_operands,
    merge_operands,
    used_operands,
)
from fxparam.graph.passes.share import Sharing, erase_unused
from fxparam.graph.passes.share_regions import marked_evaluations
from fxparam.graph.passes.sites import Candidates, Sites
from fxparam.graph.rules import (
    Rule,
)
from fxparam.graph.torch_bugs.branch_gradients import with_gradient_laid_out_alike
from fxparam.marks import (
    distinguish,
)

__all__ = ["Motion", "move_out"]


@dataclass
class Motion:
    """Attributes:
    values: how many values left a body.
    operands: how many operands turned out to be another one.
    refusals: nodes of bodies that were kept there, and why.
    origins: for each parametrized tensor, the calls it was moved out of: op and iterations.
    """

    values: int = 0
    operands: int = 0
    refusals: dict[Node, Rule] = field(default_factory=dict)
    origins: dict[str, dict[Node, tuple[str, int | None]]] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether anything moved."""
        return self.values + self.operands > 0


def move_out(levels: list[Level], shared: dict[Level, Sharing], max_bytes: float) -> Motion:
    """One step of code motion, in every graph that has calls."""
    moved = Motion()
    groups = list(_groups(levels))
    for group in groups:
        moved.operands += merge_operands(_calls_now(group))
    sites = {level: Sites(shared[level]) for level in levels}
    marked = Counter(e.shared_by for s in levels for e in marked_evaluations(s.gm))
    movable = [
        [invariants_of(level, marked, moved.refusals) for level in group] for group in groups
    ]
    for bodies in movable:
        for body in bodies:
            for context in body.level.live:
                sites[context.parent].add(body, context)
    for bodies in movable:
        _move_group(bodies, sites, moved, max_bytes)
    return moved


def _groups(levels: list[Level]) -> Iterator[list[Level]]:
    """Bodies that are run by the same calls and by no others, in the order of the arguments.

    A body that is not in such a group cannot get an operand from all of its calls at once. Inner
    bodies come before those that run them.
    """
    groups: dict[frozenset[Node], dict[int, Level]] = defaultdict(dict)
    places: dict[Level, set[int]] = defaultdict(set)
    for level in levels:
        calls = frozenset(c.call.node for c in level.live)
        if calls:
            groups[calls] = groups.pop(calls, {})  # after the bodies that its last one runs
        for context in level.live:
            groups[calls][context.index] = level
            places[level].add(context.index)
    for bodies in groups.values():
        group = [bodies[i] for i in sorted(bodies)]
        alone = all(len(places[s]) == 1 and not is_recomputed(s.gm) for s in group)
        if alone and len(group) == len(group[0].live[0].call.bodies):
            yield group


def _calls(group: list[Level]) -> list[Context]:
    """Return the calls of a group, each once."""
    return list({context.call.node: context for context in group[0].live}.values())


def _calls_now(group: list[Level]) -> list[Call]:
    """Return the calls of a group, each once, with the operands that they have now."""
    return [context.current for context in _calls(group)]


def _move_group(
    group: list[Candidates],
    sites: Mapping[Level, Sites],
    moved: Motion,
    max_bytes: float,
) -> None:
    """Move values out of the bodies of one call, or of several calls of the same bodies."""
    crossing: dict[Hashable, list[tuple[int, Node]]] = defaultdict(list)
    for index, body in enumerate(group):
        for node in entering(body, sites, moved.refusals, max_bytes):
            # One operand for one value, in whichever body it is read.
            number = tuple(numbers[node] for numbers in body.numbers)
            crossing[number].append((index, node))
    if not crossing:
        return
    levels = [body.level for body in group]
    used = used_operands(_calls_now(levels)[0])
    firsts = [places[0] for places in crossing.values()]
    made = [_copy_before(context, group, firsts, moved) for context in _calls(levels)]
    added = [_as_operand(group, places, made) for places in crossing.values()]
    entered = add_operands(_calls_now(levels), added)
    for places, placeholders in zip(crossing.values(), entered, strict=True):
        _read_operand(group, places, placeholders)
    calls = _calls_now(levels)
    drop_operands(calls, used - used_operands(calls[0]))
    moved.values += len(crossing)


def _has_a_gradient(group: list[Candidates], places: list[tuple[int, Node]]) -> bool:
    """Check whether the bodies may give a value a gradient, rather than none."""
    return not value_of(places[0][1]).requires_grad or any(
        node in group[index].differentiated for index, node in places
    )


def _detached(value: Node) -> Node:
    """Return an operand to which a call gives no gradient of zeros."""
    with value.graph.inserting_after(value):
        operand = value.graph.call_method("detach", (value,))
    operand.meta = meta_with(value, value_of(value).detach())
    return operand


def _copy_before(
    context: Context, group: list[Candidates], wanted: list[tuple[int, Node]], moved: Motion
) -> dict[Node, Any]:
    """Evaluate nodes of bodies in front of a call, with the operands of that call.

    Returns:
        What the nodes' values are taken from there.
    """
    call = context.current
    given = (*call.varying, *call.operands)
    made: dict[Node, Any] = {}
    for index, body in enumerate(group):
        copies = dict(zip(call.bodies[index].placeholders, given, strict=True))
        own = [node for i, node in wanted if i == index]
        _copy_to(context, body.level.gm, own, copies, moved)
        recompute_as_before(call, body.level.gm, own, copies)
        made.update(copies)
    return made


def _copy_to(
    context: Context, body: GraphModule, wanted: list[Node], copies: dict[Node, Any], moved: Motion
) -> None:
    """Copy nodes of a body, and what they are computed from, in front of a call of it."""
    call, gm = context.call, context.parent.gm
    needed = ancestors(wanted, lambda node: node not in copies)
    nodes = [node for node in body.graph.nodes if node in needed]
    with gm.graph.inserting_before(call.node):
        copy_nodes(nodes, gm.graph, copies, modules=(body, gm))
    for node in nodes:
        if node.op == "get_attr":
            continue
        distinguish(copies[node], call.node.name)
        evaluation = owner(node)
        if evaluation is not None:
            moved.origins.setdefault(evaluation[1], {})[call.node] = (call.op, call.iterations)


def _as_operand(
    group: list[Candidates], places: list[tuple[int, Node]], made: list[dict[Node, Any]]
) -> Operand:
    """Return the operand that a value enters the bodies as, made in front of each call."""
    node = places[0][1]
    given: list[Node] = [copies[node] for copies in made]
    if _has_a_gradient(group, places):
        return Operand(given, node.name, node.meta)
    meta = meta_with(node, value_of(node).detach())
    return Operand([_detached(value) for value in given], node.name, meta)


def _read_operand(
    group: list[Candidates], places: list[tuple[int, Node]], placeholders: list[Node]
) -> None:
    """Read the placeholder of each body in place of what was moved."""
    branches = group[0].level.live[0].call.branches
    for index, (body, placeholder) in enumerate(zip(group, placeholders, strict=True)):
        entered = with_gradient_laid_out_alike(placeholder) if branches else placeholder
        mine = [node for i, node in places if i == index]
        for node in mine:
            node.replace_all_uses_with(entered)
        erase_unused(body.level.gm, body.level.tables[0], mine, moved=body.nodes)
