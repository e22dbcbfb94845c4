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

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.bodies import Call, call_of
from fxparam.graph.effects import EffectTable
from fxparam.graph.evaluations import owner
from fxparam.graph.legality import (
    Rule,
    is_its_gradient_summed_in_reduced_precision,
    is_too_large,
    obstacle,
    runs_whenever_the_call_does,
)
from fxparam.graph.marks import distinguish, evaluation_mark, region_mark
from fxparam.graph.nodes import attribute_of, value_of
from fxparam.graph.numbering import key_of
from fxparam.graph.recompute import is_recomputed, recompute_as_before
from fxparam.graph.scopes import Context, Scope
from fxparam.graph.share import Shared, erase_unused

__all__ = ["Moved", "move_out"]


@dataclass
class Moved:
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


@dataclass
class _Movable:
    """The nodes of one body that could be evaluated before each call of it.

    Attributes:
        nodes: in order.
        stays: placeholders and attributes that are the same in each run.
        numbers: for each context, what the nodes compute in terms of the graph around.
    """

    scope: Scope
    nodes: dict[Node, None] = field(default_factory=dict)
    stays: set[Node] = field(default_factory=set)
    numbers: list[dict[Node, Hashable]] = field(default_factory=list)


def move_out(scopes: list[Scope], shared: dict[Scope, Shared], max_bytes: float) -> Moved:
    """One step of code motion, in every graph that has calls."""
    moved = Moved()
    groups = list(_groups(scopes))
    for group in groups:
        moved.operands += _merge_operands(_calls(group))
    for parent in scopes:
        mine = [group for group in groups if group[0].contexts[0].parent is parent]
        sites = _Sites(parent, shared[parent])
        movable = [[_movable(scope, moved) for scope in group] for group in mine]
        for bodies in movable:
            for body in bodies:
                sites.add(body)
        for bodies in movable:
            _move_group(bodies, sites, moved, max_bytes)
    return moved


def _groups(scopes: list[Scope]) -> Iterator[list[Scope]]:
    """Bodies that are run by the same calls and by no others, in the order of the arguments.

    A body that is not in such a group cannot get an operand from all of its calls at once.
    """
    groups: dict[frozenset[Node], dict[int, Scope]] = defaultdict(dict)
    places: dict[Scope, set[tuple[Scope, int]]] = defaultdict(set)
    for scope in scopes:
        calls = frozenset(c.call.node for c in scope.contexts)
        for context in scope.contexts:
            groups[calls][context.index] = scope
            places[scope].add((context.parent, context.index))
    for bodies in groups.values():
        group = [bodies[i] for i in sorted(bodies)]
        alone = all(len(places[s]) == 1 and not is_recomputed(s.gm) for s in group)
        if alone and len(group) == len(group[0].contexts[0].call.bodies):
            yield group


def _calls(group: list[Scope]) -> list[Context]:
    """The calls of a group, each once."""
    return list({context.call.node: context for context in group[0].contexts}.values())


def _movable(scope: Scope, moved: Moved) -> _Movable:
    found = _Movable(scope)
    varying = len(scope.contexts[0].call.varying)
    placeholders = [node for node in scope.gm.graph.nodes if node.op == "placeholder"]
    found.stays = set(placeholders[varying:])
    derived = scope.derived
    for node in scope.gm.graph.nodes:
        if node.op == "get_attr":
            found.stays.add(node)
        if node not in derived.candidates and node not in derived.constants:
            continue
        if not all(n in found.stays or n in found.nodes for n in node.all_input_nodes):
            continue
        drawn = [_is_drawn_once(c, node) for c in scope.contexts]
        why = [
            obstacle(c.around, c.call.node, _from(c.inner, c.index), node, drawn_once=once)
            for c, once in zip(scope.contexts, drawn, strict=True)
        ]
        refused = next((rule for rule in why if rule is not None), None)
        if refused is None:
            found.nodes[node] = None
        elif node in derived.candidates:
            moved.refusals[node] = refused
    return found


def _is_drawn_once(context: Context, node: Node) -> bool:
    """Whether the random numbers of a node are those of a ``cached()`` region around the call.

    Then they are drawn once; in front of the call, if no others are drawn in its bodies, among
    which they would have their turn.
    """
    mark = evaluation_mark(node)
    if mark is None or mark[0] != region_mark(context.call.node):
        return False
    if not context.call.bodies[context.index].always:
        return False
    drawing = [n for table in context.inner for n, e in table.of.items() if e.random]
    marks = [evaluation_mark(n) for n in drawing]
    return all(m is not None and m[:2] == mark[:2] for m in marks)


def _from(tables: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return (tables[index], *tables[:index], *tables[index + 1 :])


class _Sites:
    """Where in a graph, and in the bodies it runs, a value is evaluated."""

    def __init__(self, parent: Scope, shared: Shared) -> None:
        self.parent, self.shared = parent, shared
        self._fresh: dict[Hashable, Hashable] = {}
        self._runs: dict[Hashable, set[tuple[Node, int]]] = defaultdict(set)

    def add(self, body: _Movable) -> None:
        for context in body.scope.contexts:
            numbers = self._numbers(body, context)
            body.numbers.append(numbers)
            for node in body.nodes:
                self._runs[numbers[node]].add((context.call.node, context.index))

    def _numbers(self, body: _Movable, context: Context) -> dict[Node, Hashable]:
        call = _fresh_call(context)
        given = (*call.varying, *call.operands)
        placeholders = call.bodies[context.index].placeholders
        outer = self.shared.number
        numbers: dict[Node, Hashable] = {
            p: outer.get(v, v) if isinstance(v, Node) else ("literal", id(v))
            for p, v in zip(placeholders, given, strict=True)
        }
        for node in body.scope.gm.graph.nodes:
            if node not in body.nodes and node not in body.stays or node.op == "placeholder":
                continue
            key = key_of(body.scope.gm, node, numbers)
            first: Hashable = self._outside(key, context)
            if first is None:
                first = self._fresh.setdefault((key, _state(context, node)), object())
            numbers[node] = first
        return numbers

    def _outside(self, key: Hashable, context: Context) -> Node | None:
        """A node of the graph around that has the value of ``key`` when the call runs."""
        for first in self.shared.firsts.get(key, ()):
            if first.op == "get_attr":
                return first
            where = context.outer.position[first], context.outer.position[context.call.node]
            reads = context.outer.of[first].reads
            if context.outer.of[first].modes != context.outer.of[context.call.node].modes:
                continue
            if not context.outer.written(reads, min(where), max(where)):
                return first
        return None

    def is_outside(self, number: Hashable) -> bool:
        return isinstance(number, Node)

    def on_every_path(self, number: Hashable, context: Context) -> bool:
        """Whether the other bodies of the call evaluate it as well."""
        others = set(range(len(context.call.bodies))) - {context.index}
        return bool(others) and all((context.call.node, i) in self._runs[number] for i in others)

    def is_repeated(self, number: Hashable) -> bool:
        return self.is_outside(number) or len(self._runs[number]) > 1


def _state(context: Context, node: Node) -> Hashable:
    """What else two calls must have in common for a node to have one value in both."""
    reads = context.inner[context.index].of[node].reads
    where = context.outer.position[context.call.node]
    return context.outer.of[context.call.node].modes, context.outer.writes(reads, before=where)


def _fresh_call(context: Context) -> Call:
    """The call as it is now: merging has replaced operands since it was looked at."""
    call = call_of(context.parent.gm, context.call.node)
    assert call is not None
    return call


def _move_group(group: list[_Movable], sites: _Sites, moved: Moved, max_bytes: float) -> None:
    """Move values out of the bodies of one call, or of several calls of the same bodies."""
    crossing: dict[Hashable, list[tuple[int, Node]]] = defaultdict(list)
    for index, body in enumerate(group):
        for node in _crossing(body, sites, moved, max_bytes):
            # One operand for one value, in whichever body it is read.
            number = tuple(numbers[node] for numbers in body.numbers)
            crossing[number].append((index, node))
    if not crossing:
        return
    contexts = _calls([body.scope for body in group])
    used = _used_operands(contexts[0])
    firsts = [places[0] for places in crossing.values()]
    for context in contexts:
        call = _fresh_call(context)
        copies: dict[Node, Any] = {}
        for index, body in enumerate(group):
            wanted = [node for i, node in firsts if i == index]
            copies.update(_copy_before(call, index, body, wanted, moved))
            recompute_as_before(call, body.scope.gm, wanted, copies)
        call.set_operands([*call.operands, *(copies[node] for _, node in firsts)])
    for places in crossing.values():
        _enter_as_operand(group, places)
    _drop_operands(contexts, used - _used_operands(contexts[0]))
    moved.values += len(crossing)


def _crossing(body: _Movable, sites: _Sites, moved: Moved, max_bytes: float) -> list[Node]:
    """The values that what stays in the body reads."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()

    def require(node: Node) -> None:
        if node in seen or node not in body.nodes:
            return
        seen.add(node)
        refused = _stays_inside(body, node, sites, max_bytes)
        if refused is None:
            found[node] = None
            return
        if isinstance(refused, Rule) and node in body.scope.derived.candidates:
            moved.refusals[node] = refused
        for argument in node.all_input_nodes:
            require(argument)

    for node in body.scope.gm.graph.nodes:
        if node not in body.nodes:
            for argument in node.all_input_nodes:
                require(argument)
    return list(found)


def _stays_inside(
    body: _Movable, node: Node, sites: _Sites, max_bytes: float
) -> Rule | bool | None:
    """Why a value that could be made before the call is made in the body, None if it is not."""
    scope = body.scope
    if node not in scope.derived.candidates or not isinstance(value_of(node), torch.Tensor):
        return True  # a constant of the user's, a number, a tuple
    if _is_view(scope.tables[0], node):
        return True
    repeated = False
    for context, numbers in zip(scope.contexts, body.numbers, strict=True):
        number = numbers[node]
        if not runs_whenever_the_call_does(
            context.inner[context.index],
            node,
            always=context.call.bodies[context.index].always,
            branch=context.call.branches,
            on_every_path=sites.is_outside(number) or sites.on_every_path(number, context),
        ):
            return Rule.MAY_NOT_RUN
        if context.loops and is_its_gradient_summed_in_reduced_precision(node):
            return Rule.REDUCED
        repeated |= context.loops or sites.is_repeated(number)
    if not repeated and not scope.looped:
        return Rule.ONE_USE
    return Rule.TOO_LARGE if is_too_large(node, max_bytes) else None


def _is_view(table: EffectTable, node: Node) -> bool:
    """Whether the value shows memory of an input of its op, or of the op it is one result of."""
    op = node.args[0] if node.target is operator.getitem else node
    if not isinstance(op, Node) or isinstance(value_of(op), torch.Tensor):
        op = node
    return bool(table.of[node].storages & table.of[op].reads)


def _copy_before(
    call: Call, index: int, body: _Movable, wanted: list[Node], moved: Moved
) -> dict[Node, Any]:
    """Evaluate nodes of a body in front of a call, with the operands of that call."""
    given = (*call.varying, *call.operands)
    copies: dict[Node, Any] = dict(zip(call.bodies[index].placeholders, given, strict=True))
    needed: set[Node] = set()
    work = list(wanted)
    while work:
        node = work.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            work.extend(node.all_input_nodes)
    gm = next(iter(body.scope.contexts)).parent.gm
    with gm.graph.inserting_before(call.node):
        for node in body.scope.gm.graph.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                copies[node] = _copy_attribute(gm, body.scope.gm, node)
                continue
            copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            distinguish(copies[node], call.node.name)
            evaluation = owner(node)
            if evaluation is not None:
                moved.origins.setdefault(evaluation[1], {})[call.node] = (call.op, call.iterations)
    return copies


def _copy_attribute(gm: GraphModule, body: GraphModule, node: Node) -> Node:
    """A ``get_attr`` for what a body's module holds, in the graph around."""
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


def _enter_as_operand(group: list[_Movable], places: list[tuple[int, Node]]) -> None:
    """Read a new placeholder, the last one of each body, in place of what was moved."""
    name = places[0][1].name
    for index, body in enumerate(group):
        graph = body.scope.gm.graph
        last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
        point = graph.inserting_after(last[0]) if last else graph.inserting_before()
        with point:
            entered = graph.placeholder(name)
        entered.target = entered.name  # an argument's name, which must be its own
        entered.meta = dict(places[0][1].meta)
        mine = [node for i, node in places if i == index]
        for node in mine:
            node.replace_all_uses_with(entered)
        erase_unused(body.scope.gm, body.scope.tables[0], mine, moved=body.nodes)


def _merge_operands(contexts: list[Context]) -> int:
    """Make operands one that are the same in each call; ops refuse operands that alias."""
    calls = [_fresh_call(context) for context in contexts]
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
    _drop_operands(contexts, set(doubled))
    return len(doubled)


def _used_operands(context: Context) -> set[int]:
    """Indices of the operands that a body reads."""
    call = _fresh_call(context)
    skip = len(call.varying)
    columns = zip(*(body.placeholders[skip:] for body in call.bodies), strict=True)
    return {i for i, column in enumerate(columns) if any(p.users for p in column)}


def _drop_operands(contexts: list[Context], unused: set[int]) -> None:
    """Take operands that nothing reads any more from the calls and from their bodies."""
    bodies = _fresh_call(contexts[0]).bodies
    for context in contexts:
        call = _fresh_call(context)
        call.set_operands([v for i, v in enumerate(call.operands) if i not in unused])
    skip = len(contexts[0].call.varying)
    for body in bodies:
        for i, placeholder in enumerate(body.placeholders[skip:]):
            if i in unused:
                body.module.graph.erase_node(placeholder)
