"""The graphs of one capture: the outermost one and the bodies that its nodes run, innermost first.

A body that several calls run is one graph seen in several contexts, and what is done to it must be
right in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from fxparam._torch.fx import is_erased
from fxparam.graph.analysis.bodies import Call, call_of
from fxparam.graph.analysis.derived import Derived, derive, is_parameter
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.nodes import ancestors

__all__ = [
    "Context",
    "Level",
    "inputs_in_each_run",
    "inputs_kept_apart",
    "is_run_again",
    "levels_of",
]


@dataclass(frozen=True)
class Context:
    """One call that runs a body: where from, and what the body does then."""

    parent: Level
    outer: EffectTable
    call: Call
    index: int  # of the body among those of the call
    inner: tuple[EffectTable, ...]  # of all bodies of the call

    @property
    def current(self) -> Call:
        """The call as it is now: merging and motion have changed operands since the analysis."""
        call = call_of(self.parent.gm, self.call.node)
        assert call is not None
        return call

    @property
    def around(self) -> list[EffectTable]:
        """The effects of the graphs around the body, innermost first."""
        above = (c.around for c in self.parent.contexts if c.inner[c.index] is self.outer)
        return [self.outer, *next(above, [])]


@dataclass(eq=False)
class Level:
    """One graph.

    Attributes:
        tables: its effects, in each context.
        contexts: the calls that run it; none for the outermost graph.
    """

    gm: GraphModule
    derived: Derived = field(default_factory=lambda: Derived(frozenset(), frozenset(), frozenset()))
    tables: list[EffectTable] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)

    @property
    def live(self) -> list[Context]:
        """The contexts whose calls are still there: sharing erases calls, too."""
        return [c for c in self.contexts if not is_erased(c.call.node)]

    @property
    def runs(self) -> int | None:
        """How many times one run of the outermost graph runs it; None if not known.

        Zero once the calls that ran it were shared.
        """
        total = 0 if self.contexts else 1
        for context in self.live:
            outer, inner = context.parent.runs, context.call.iterations
            if outer is None or inner is None:
                return None
            # A branch may run or not: counted as if it did.
            total += outer * inner // max(1, len(context.parent.tables))
        return total


def inputs_in_each_run(level: Level, nodes: Iterable[Node]) -> Iterator[frozenset[Node]]:
    """For each run of a graph, which inputs of the outermost graph some nodes are computed from.

    A loop's body counts as run twice. The nodes do not depend on what varies between its runs.
    """
    inputs = [n for n in ancestors(nodes) if n.op in ("placeholder", "get_attr")]
    if not level.contexts:
        yield frozenset(inputs)
        return
    for context in {c.call.node: c for c in level.live}.values():
        call = context.current
        given = (*call.varying, *call.operands)
        seats = dict(zip(call.bodies[context.index].placeholders, given, strict=True))
        operands = [seats[n] for n in inputs if isinstance(seats.get(n), Node)]
        for run in inputs_in_each_run(context.parent, operands):
            yield run
            if context.call.loops:
                yield run


def is_run_again(level: Level, nodes: Iterable[Node]) -> bool:
    """Check whether a graph is run more than once on the same inputs of some of its nodes."""
    seen: set[frozenset[Node]] = set()
    for run in inputs_in_each_run(level, nodes):
        if run in seen:
            return True
        seen.add(run)
    return False


def inputs_kept_apart(levels: list[Level]) -> tuple[Node, ...]:
    """Return the inputs that a capture writes, and those that its evaluations are computed from.

    Empty if it writes no input. Sharing asks which of them are the same memory.

    Args:
        levels: its graphs, before any was changed.
    """
    (table,) = levels[-1].tables
    inputs = levels[-1].gm.graph.find_nodes(op="placeholder")
    written = {n for n in inputs if not table.writers.keys().isdisjoint(table.of[n].storages)}
    if not written:
        return ()
    runs = (run for level in levels for run in inputs_in_each_run(level, level.derived.candidates))
    read = frozenset().union(*runs)
    return tuple(node for node in inputs if node in written or node in read)


def levels_of(gm: GraphModule, table: EffectTable) -> list[Level]:
    """Return every graph that a run of ``gm`` runs, bodies before the graphs that run them."""
    found: dict[GraphModule, Level] = {}
    order: list[Level] = []

    def visit(module: GraphModule, table: EffectTable) -> Level:
        level = found.setdefault(module, Level(module))
        level.tables.append(table)
        for call, inner in table.calls.values():
            for index, body in enumerate(call.bodies):
                child = visit(body.module, inner[index])
                child.contexts.append(Context(level, table, call, index, inner))
        if level not in order:
            order.append(level)
        return level

    visit(gm, table)
    for level in reversed(order):
        level.derived = derive(level.gm, _derived_inputs(level))
    return order


def _derived_inputs(level: Level) -> set[Node]:
    placeholders = [node for node in level.gm.graph.nodes if node.op == "placeholder"]
    if not level.contexts:
        return {node for node in placeholders if is_parameter(node)}
    found = set(placeholders)
    for context in level.contexts:
        outer = context.parent.derived
        given = (*(None for _ in context.call.varying), *context.call.operands)
        found &= {
            placeholder
            for placeholder, operand in zip(placeholders, given, strict=True)
            if operand in outer.nodes or operand in outer.constants
        }
    return found
