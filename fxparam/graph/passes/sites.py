"""Where a value is evaluated: in a graph, and in which of the bodies that it runs.

Values of bodies are numbered in terms of the graph around, so that one number is one value wherever
it is computed. A value that is evaluated in two places is worth moving; one that every path
evaluates may be moved out of a branch (rule 6).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch.fx import Node

from fxparam.graph.analysis.gradients import reached_by_gradients
from fxparam.graph.analysis.nesting import Context, Level
from fxparam.graph.analysis.numbering import key_of
from fxparam.graph.passes.share import Sharing

__all__ = ["Candidates", "Sites"]


@dataclass
class Candidates:
    """The nodes of one body that may be evaluated in front of the calls of the body.

    Attributes:
        level: the body.
        nodes: those nodes, in order.
        evaluated_again: of those, the nodes of a marked evaluation whose tensor the same
            ``cached()`` region evaluates elsewhere too.
        invariant: placeholders and attributes that are the same in each run of the body.
        numbers: for each call of the body, the value number of each node in the graph around.
        differentiated: nodes of the body that a gradient may come back to.
        narrow: nodes of the body with fewer bits than what they are computed from.
    """

    level: Level
    nodes: dict[Node, None] = field(default_factory=dict)
    evaluated_again: set[Node] = field(default_factory=set)
    invariant: set[Node] = field(default_factory=set)
    numbers: list[dict[Node, Hashable]] = field(default_factory=list)
    differentiated: set[Node] = field(default_factory=set)
    narrow: frozenset[Node] = frozenset()


class Sites:
    """The places in a graph, and in the bodies it runs, where each value is evaluated."""

    def __init__(self, shared: Sharing) -> None:
        self.shared = shared
        self._fresh: dict[Hashable, Hashable] = {}
        self._runs: dict[Hashable, set[tuple[Node, int]]] = defaultdict(set)
        self._gradients: dict[Hashable, set[tuple[Node, int]]] = defaultdict(set)
        self._reached: set[Node] | None = None

    def add(self, body: Candidates, context: Context) -> None:
        """Number a body's values as one of the graph's calls runs it."""
        numbers = self._numbers(body, context)
        body.numbers.append(numbers)
        for node in body.nodes:
            self._runs[numbers[node]].add((context.call.node, context.index))
            if node in body.differentiated:
                self._gradients[numbers[node]].add((context.call.node, context.index))

    def _numbers(self, body: Candidates, context: Context) -> dict[Node, Hashable]:
        call = context.current
        given = (*call.varying, *call.operands)
        placeholders = call.bodies[context.index].placeholders
        outer = self.shared.number
        numbers: dict[Node, Hashable] = {
            p: outer.get(v, v) if isinstance(v, Node) else ("literal", id(v))
            for p, v in zip(placeholders, given, strict=True)
        }
        for node in body.level.gm.graph.nodes:
            if node not in body.nodes and node not in body.invariant or node.op == "placeholder":
                continue
            if node in body.nodes and context.inner[context.index].of[node].random:
                numbers[node] = object()  # as no other value
                continue
            key = key_of(body.level.gm, node, numbers)
            first: Hashable = self._outside(key, context)
            if first is None:
                first = self._fresh.setdefault((key, _state(context, node)), object())
            numbers[node] = first
        return numbers

    def _outside(self, key: Hashable, context: Context) -> Node | None:
        """Return a node of the graph around that has the value of ``key`` when the call runs."""
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
        """Check whether the other bodies of the call evaluate it as well."""
        others = set(range(len(context.call.bodies))) - {context.index}
        return bool(others) and all((context.call.node, i) in self._runs[number] for i in others)

    def gradients(self, number: Hashable, context: Context) -> list[bool]:
        """For each body of the call, whether a gradient comes back to the value from it."""
        seats = range(len(context.call.bodies))
        return [(context.call.node, i) in self._gradients[number] for i in seats]

    def has_a_gradient_outside(self, number: Hashable, context: Context) -> bool:
        if not isinstance(number, Node):
            return False
        if self._reached is None:
            self._reached = reached_by_gradients(number.graph, context.outer)
        return number in self._reached

    def is_repeated(self, number: Hashable) -> bool:
        return self.is_outside(number) or len(self._runs[number]) > 1


def _state(context: Context, node: Node) -> Hashable:
    """Return a key for the modes and writes in front of a call, on which a value depends."""
    reads = context.inner[context.index].of[node].reads
    where = context.outer.position[context.call.node]
    return context.outer.of[context.call.node].modes, context.outer.writes(reads, before=where)
