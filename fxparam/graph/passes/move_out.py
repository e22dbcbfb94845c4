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

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.bodies import Call
from fxparam.graph.analysis.nesting import Context, Level
from fxparam.graph.analysis.nodes import ancestors, attribute_of, meta_with, owner, value_of
from fxparam.graph.passes.checkpoint_policy import is_recomputed, recompute_as_before
from fxparam.graph.passes.invariants import entering, invariants_of
from fxparam.graph.passes.operands import drop_operands, merge_operands, used_operands
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
        moved.operands += merge_operands(_calls(group))
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
    contexts = _calls([body.level for body in group])
    used = used_operands(contexts[0])
    firsts = [places[0] for places in crossing.values()]
    for context in contexts:
        call = context.current
        copies: dict[Node, Any] = {}
        for index, body in enumerate(group):
            wanted = [node for i, node in firsts if i == index]
            copies.update(_copy_before(context, call, index, body, wanted, moved))
            recompute_as_before(call, body.level.gm, wanted, copies)
        operands = [
            copies[places[0][1]] if _has_a_gradient(group, places) else _detached(copies, places)
            for places in crossing.values()
        ]
        call.set_operands([*call.operands, *operands])
    for places in crossing.values():
        _enter_as_operand(group, places, contexts[0].call.branches)
    drop_operands(contexts, used - used_operands(contexts[0]))
    moved.values += len(crossing)


def _has_a_gradient(group: list[Candidates], places: list[tuple[int, Node]]) -> bool:
    """Check whether the bodies may give a value a gradient, rather than none."""
    return not value_of(places[0][1]).requires_grad or any(
        node in group[index].differentiated for index, node in places
    )


def _detached(copies: dict[Node, Any], places: list[tuple[int, Node]]) -> Node:
    """Return an operand to which a call gives no gradient of zeros."""
    value: Node = copies[places[0][1]]
    with value.graph.inserting_after(value):
        operand = value.graph.call_method("detach", (value,))
    operand.meta = meta_with(value, value_of(value).detach())
    return operand


def _copy_before(
    context: Context, call: Call, index: int, body: Candidates, wanted: list[Node], moved: Motion
) -> dict[Node, Any]:
    """Evaluate nodes of a body in front of a call, with the operands of that call."""
    given = (*call.varying, *call.operands)
    copies: dict[Node, Any] = dict(zip(call.bodies[index].placeholders, given, strict=True))
    needed = ancestors(wanted, lambda node: node not in copies)
    gm = context.parent.gm
    with gm.graph.inserting_before(call.node):
        for node in body.level.gm.graph.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                copies[node] = _copy_attribute(gm, body.level.gm, node)
                continue
            copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            distinguish(copies[node], call.node.name)
            evaluation = owner(node)
            if evaluation is not None:
                moved.origins.setdefault(evaluation[1], {})[call.node] = (call.op, call.iterations)
    return copies


def _copy_attribute(gm: GraphModule, body: GraphModule, node: Node) -> Node:
    """Return a ``get_attr`` for what a body's module holds, in the graph around."""
    value = attribute_of(body, node)
    name = f"_moved_{str(node.target).replace('.', '_')}"
    while getattr(gm, name, value) is not value:
        name += "_"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value, persistent=False)
    else:
        setattr(gm, name, value)
    copied = gm.graph.get_attr(name)
    copied.meta = dict(node.meta)
    return copied


def _enter_as_operand(
    group: list[Candidates], places: list[tuple[int, Node]], branches: bool
) -> None:
    """Read a new placeholder, the last one of each body, in place of what was moved."""
    name = places[0][1].name
    for index, body in enumerate(group):
        graph = body.level.gm.graph
        last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
        point = graph.inserting_after(last[0]) if last else graph.inserting_before()
        with point:
            entered = graph.placeholder(name)
        entered.target = entered.name  # an argument's name, which must be its own
        value = value_of(places[0][1])
        given = value if _has_a_gradient(group, places) else value.detach()
        entered.meta = meta_with(places[0][1], given)
        if branches:
            entered = with_gradient_laid_out_alike(entered)
        mine = [node for i, node in places if i == index]
        for node in mine:
            node.replace_all_uses_with(entered)
        erase_unused(body.level.gm, body.level.tables[0], mine, moved=body.nodes)
