"""Evaluations taken out of a graph that is run in an eager ``cached()`` region.

    def graph(x, p):                    w = region.value_of(...)
        w = f(p)
        return linear(x, w)     ->      def graph(x, p, w):
                                            return linear(x, w)

The region has the value already, or evaluates and keeps it for what runs after the graph. It is
looked up before the graph runs, with the originals and modes of that moment; so an evaluation can
be taken out only if it might as well run first, and if nothing of it but its value is used in the
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.fx import copy_dynamo_graph, is_erased, mark_as_added_input
from fxparam._torch.tensors import geometry, is_wrapper_subclass
from fxparam.graph.analysis.bodies import call_of
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.gradients import ends_reached
from fxparam.graph.analysis.modes import switches_a_mode
from fxparam.graph.analysis.nodes import ancestors, attribute_of, body_of, value_of
from fxparam.graph.passes.drop_idle_switches import drop_idle_switches
from fxparam.graph.rules import (
    has_effects,
    has_one_backward_for_all,
    may_a_gradient_be_taken,
)
from fxparam.marks import (
    EvaluationMark,
    evaluation_marks,
    evaluation_of_value,
    is_for_a_region_around,
)

__all__ = [
    "Alone",
    "CannotTakeOut",
    "TakenOut",
    "all_of",
    "is_in_a_region_around",
    "take_outside",
]


T = TypeVar("T")


class CannotTakeOut(Exception):
    """Evaluations cannot be taken out of their graph: those of ``chains``."""

    def __init__(self, *reasons: tuple[int, str]) -> None:
        super().__init__("; ".join(reason for _, reason in reasons))
        self.reasons = reasons

    @property
    def chains(self) -> list[int]:
        return [chain for chain, _ in self.reasons]


def all_of(checks: Iterable[Callable[[], T]]) -> list[T]:
    """Return the results of calls, if each has one.

    Raises:
        CannotTakeOut: for all of those that raise it.
    """
    found: list[T] = []
    reasons: list[tuple[int, str]] = []
    for check in checks:
        try:
            found.append(check())
        except CannotTakeOut as refused:
            reasons.extend(refused.reasons)
    if reasons:
        raise CannotTakeOut(*reasons)
    return found


@dataclass(frozen=True)
class TakenOut:
    """An evaluation that a graph has no more.

    Attributes:
        chain: the identity of the parametrization list.
        training: the training modes of its modules, as traced.
        modes: the modes it is read under, as traced.
        inputs: which of the inputs of the graph it is computed from.
        attributes: the tensors of the graph that it is computed from, too.
        value: an example of the value.
        pure: whether it has no effects.
        returned: whether the graph may return the value, or a view of it.
        additive: whether its backward is known to be additive in the gradient.
        ends: from which ends of the graph a gradient may come to it, as ``ends_reached`` says.
    """

    chain: int
    training: str
    modes: str
    inputs: tuple[int, ...]
    attributes: tuple[Any, ...]
    value: Any
    pure: bool
    returned: bool
    additive: bool
    ends: int

    def read_by(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the tensors that it is computed from, in a call of the graph with inputs."""
        return [*(inputs[i] for i in self.inputs), *self.attributes]


#: From positions in the evaluations taken out to a graph that computes these alone, with all the
#: inputs of the graph that they were taken out of.
Alone = Callable[[Sequence[int]], GraphModule]


def is_in_a_region_around(gm: GraphModule) -> bool:
    """Check whether a graph has evaluations for the ``cached()`` region that it runs in."""
    return any(map(is_for_a_region_around, _calls(gm)))


def take_outside(
    source: GraphModule, *, grad_enabled: bool, static: bool = False
) -> tuple[GraphModule, list[TakenOut], Alone]:
    """Replace what a graph evaluates for the region around it by inputs, at the end of its inputs.

    Args:
        source: a graph of Dynamo's, hoisted.
        grad_enabled: the grad mode in which it is called.
        static: whether the new inputs have the same addresses in each call, mostly, as weights do:
            CUDA graphs then read them where they are.

    Returns:
        Another graph (Dynamo still reads the inputs off its own); the evaluations, in the order of
        the new inputs, to be run before it; and what makes graphs of them.

    Raises:
        CannotTakeOut: one of them cannot be taken out.
    """
    gm = copy_dynamo_graph(source)
    table = analyze(gm, grad_enabled=grad_enabled, autocast_now=True)
    found = all_of(partial(_alone, check) for check in _evaluations(gm, table))
    _check_order(table, found)
    inputs = gm.graph.find_nodes(op="placeholder")
    ends = ends_reached(gm.graph, table)
    outside = [each.outside(gm, inputs, table, ends.get(each.value, 0)) for each in found]
    alone = _alone_in(gm, found)
    for each in found:
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        with gm.graph.inserting_before(first):
            last = gm.graph.placeholder(f"{each.value.name}_of_region")
        last.meta["example_value"] = value_of(each.value)
        mark_as_added_input(last, static=static)
        each.value.replace_all_uses_with(last)
        for node in reversed(each.nodes):
            if not (node.users or is_erased(node)):  # two may have nodes in common
                gm.graph.erase_node(node)
    modes = analyze(gm, grad_enabled=grad_enabled, autocast_now=True)
    drop_idle_switches(gm, [modes])
    gm.graph.lint()
    gm.recompile()
    return gm, outside, alone


@dataclass(frozen=True)
class _Found:
    """The nodes of an evaluation in the graph, in order, what they are computed from included.

    Attributes:
        left_behind: nodes that the graph uses besides the value, and the inputs of the graph that
            they wrote to and returned.
    """

    chain: int
    mark: EvaluationMark
    nodes: tuple[Node, ...]
    value: Node
    left_behind: dict[Node, Node]

    def outside(
        self, gm: GraphModule, inputs: list[Node], table: EffectTable, ends: int
    ) -> TakenOut:
        read = {n for node in self.nodes for n in node.all_input_nodes}
        attributes = (attribute_of(gm, n) for n in read if n.op == "get_attr")
        return TakenOut(
            self.chain,
            self.mark.training,
            self.mark.modes,
            tuple(i for i, node in enumerate(inputs) if node in read),
            tuple(each for each in attributes if not isinstance(each, GraphModule)),
            value_of(self.value),
            all(has_effects(table, node) is None for node in self.nodes),
            bool(table.of[self.value].storages & table.escaping),
            all(has_one_backward_for_all(table, node) for node in self.nodes),
            ends,
        )


def _alone_in(gm: GraphModule, found: list[_Found]) -> Alone:
    """Return what copies a graph as it is now, and leaves nothing but some of its evaluations."""
    whole = copy_dynamo_graph(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    nodes = [[position[node] for node in each.nodes] for each in found]
    values = [position[each.value] for each in found]

    def alone(chosen: Sequence[int]) -> GraphModule:
        copy = copy_dynamo_graph(whole)
        copies = list(copy.graph.nodes)
        kept = {copies[i] for each in chosen for i in nodes[each]}
        copy.graph.output_node().args = (tuple(copies[values[each]] for each in chosen),)
        for node in reversed(copies):
            needed = node.op in ("placeholder", "output") or node in kept or node.users
            if not needed and not switches_a_mode(node):
                copy.graph.erase_node(node)
        copy.recompile()
        return copy

    return alone


def _evaluations(gm: GraphModule, table: EffectTable) -> Iterator[Callable[[], _Found]]:
    """For each parametrization list, what finds its evaluation."""
    marked: dict[int, list[Node]] = {}
    for node in _calls(gm):
        mark = _mark(node)
        if mark is not None and not switches_a_mode(node):
            marked.setdefault(mark.identity, []).append(node)
    tables = list(_tables(table))
    for chain, nodes in marked.items():
        seen = [(each, node) for each in tables for node in nodes if node in each.of]
        if any(node not in table.of for node in nodes) and all(
            _may_go_on(tables, *each) for each in seen
        ):
            continue  # reads cannot leave a body
        effects = any(has_effects(each, node) is not None for each, node in seen)
        values = [n for n in nodes if evaluation_of_value(n) == evaluation_marks(n)[0].chain]
        if values or effects:
            yield partial(_found, gm, table, chain, nodes, values)


def _tables(table: EffectTable) -> Iterator[EffectTable]:
    """Yield the effects of a graph and of its bodies."""
    yield table
    for _, bodies in table.calls.values():
        for body in bodies:
            yield from _tables(body)


def _may_go_on(tables: list[EffectTable], own: EffectTable, node: Node) -> bool:
    """Check whether evaluating in the graph again gives what taking the value gives."""
    effects = own.of[node]
    return (
        has_effects(own, node) is None
        and has_one_backward_for_all(own, node)
        and not any(each.written(effects.reads | effects.storages) for each in tables)
        and not any(effects.storages & each.escaping for each in tables)
    )


def _found(
    gm: GraphModule, table: EffectTable, chain: int, marked: list[Node], values: list[Node]
) -> _Found:
    if any(node not in table.of or len(evaluation_marks(node)) > 1 for node in marked):
        raise CannotTakeOut((chain, "it is in a body, or a part of another"))
    if len(values) != 1:
        raise CannotTakeOut((chain, "it is evaluated several times, or for its effects"))
    (value,) = values
    needed = ancestors([*marked, value], lambda n: n.op not in ("placeholder", "get_attr"))
    nodes = tuple(node for node in gm.graph.nodes if node in needed)
    entry = table.of[next(iter(gm.graph.nodes))].modes
    for node in nodes:
        own = _mark(node)
        if has_effects(table, node) is not None and (own is None or own.identity != chain):
            raise CannotTakeOut((chain, "it is computed from what has effects"))
        if call_of(gm, node) is not None:
            raise CannotTakeOut((chain, "it runs a loop or branch"))
        if _but_grad(table.of[node].modes) != _but_grad(entry):
            raise CannotTakeOut((chain, "modes are switched"))
    if any(may_a_gradient_be_taken(table, node) for node in nodes):
        raise CannotTakeOut((chain, "the graph itself takes gradients"))
    left_behind = _left_behind(table, chain, nodes, value)
    example = value_of(value)
    if not isinstance(example, torch.Tensor) or is_wrapper_subclass(example):
        raise CannotTakeOut((chain, "its value is no plain tensor"))
    if not all(isinstance(n, int) for n in (*example.shape, *example.stride())):
        raise CannotTakeOut((chain, "its value has a dynamic shape"))
    memory = table.of[value].storages
    given = (table.of[node].storages for node in gm.graph.find_nodes(op="placeholder"))
    made = memory & _written(table, nodes)
    if table.written(memory, table.position[value]) or any(made & each for each in given):
        raise CannotTakeOut((chain, "its value is written"))
    return _Found(chain, evaluation_marks(value)[0], nodes, value, left_behind)


def _left_behind(
    table: EffectTable, chain: int, nodes: tuple[Node, ...], value: Node
) -> dict[Node, Node]:
    """Return the nodes of an evaluation that the graph uses besides its value.

    With each comes what is there without it: the buffer that it has written to and returned.

    An evaluation without effects may go on in the graph as well.
    """
    members, effects = {*nodes}, any(has_effects(table, node) is not None for node in nodes)
    found: dict[Node, Node] = {}
    for node in nodes:
        users = [user for user in node.users if user not in members]
        if node is value or not users:
            continue
        written = next((n for n in node.all_input_nodes if _is_returned(table, n, node)), None)
        if written is not None:
            found[node] = written
        elif effects or any(user.op == "output" for user in users):
            raise CannotTakeOut((chain, "more of it than its value is used"))
    return found


def _alone(check: Callable[[], _Found]) -> _Found:
    """Let the rest of the graph read the buffers that an evaluation writes as inputs."""
    found = check()
    for node, written in found.left_behind.items():
        node.replace_all_uses_with(written, lambda user: user not in found.nodes)
    return found


def _is_returned(table: EffectTable, given: Node, node: Node) -> bool:
    """Check whether an input of the graph is what a node writes to and returns."""
    a, b = value_of(given), value_of(node)
    if given.op != "placeholder" or not isinstance(b, torch.Tensor):
        return False
    same_memory = table.of[given].storages == table.of[node].storages == table.of[node].writes
    return same_memory and geometry(a) == geometry(b)


def _written(table: EffectTable, nodes: Iterable[Node]) -> frozenset[int]:
    return frozenset().union(*(table.of[node].writes for node in nodes))


def _check_order(table: EffectTable, found: list[_Found]) -> None:
    """Raise unless the evaluations may run before the rest of the graph, one by one."""
    done: set[Node] = set()
    for each in found:
        done.update(each.nodes)
        writes = _written(table, each.nodes)
        reads = frozenset().union(*(table.of[n].reads for n in each.nodes))
        impure = any(has_effects(table, node) is not None for node in each.nodes)
        end = max(table.position[node] for node in each.nodes)
        for node, effects in table.of.items():
            if table.position[node] > end:
                break
            if node in done or node.op in ("placeholder", "get_attr"):
                continue
            if effects.writes_all or effects.writes & reads:
                raise CannotTakeOut((each.chain, "what it reads is written before"))
            if impure and (effects.random or (effects.reads | effects.storages) & writes):
                raise CannotTakeOut((each.chain, "its effects are seen before"))
    for each, later in zip(found, found[1:], strict=False):
        if table.position[each.nodes[-1]] > table.position[later.nodes[0]]:
            both = (*each.nodes, *later.nodes)
            if any(has_effects(table, node) is not None for node in both):
                raise CannotTakeOut((later.chain, "it overlaps with another"))


def _calls(gm: GraphModule) -> Iterator[Node]:
    """Yield the calls of a graph and of its bodies, but for bodies that are in evaluations.

    As of a custom ``autograd.Function``.
    """
    todo, seen = [gm], {gm}
    while todo:
        module = todo.pop()
        for node in module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                yield node
            body = body_of(module, node)
            if body is None or body in seen or all(map(is_for_a_region_around, node.users)):
                continue
            seen.add(body)
            todo.append(body)


def _mark(node: Node) -> EvaluationMark | None:
    """Return the outermost evaluation for a region around the graph that a node is a part of."""
    return evaluation_marks(node)[0] if is_for_a_region_around(node) else None


def _but_grad(modes: Any) -> Any:
    return (modes[0], *modes[2:]) if isinstance(modes, tuple) else modes
