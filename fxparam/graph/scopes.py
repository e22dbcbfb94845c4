"""The graphs of one capture: the outermost one and the bodies that its nodes run, innermost first.

A body that several calls run is one graph seen in several contexts, and what is done to it must be
right in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from fxparam.graph.bodies import Call, call_of
from fxparam.graph.derived import Derived, derive, is_parameter
from fxparam.graph.effects import EffectTable
from fxparam.graph.nodes import ancestors

__all__ = ["Context", "Scope", "inputs_in_each_run", "is_run_again", "scopes_of"]


@dataclass(frozen=True)
class Context:
    """One call that runs a body: where from, and what the body does then."""

    parent: Scope
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
    def loops(self) -> bool:
        """The call runs its bodies more than once."""
        return self.call.loops

    @property
    def around(self) -> list[EffectTable]:
        """The effects of the graphs around the body, innermost first."""
        above = (c.around for c in self.parent.contexts if c.inner[c.index] is self.outer)
        return [self.outer, *next(above, [])]


@dataclass(eq=False)
class Scope:
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
        return [c for c in self.contexts if not c.call.node._erased]

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


def inputs_in_each_run(scope: Scope, nodes: Iterable[Node]) -> Iterator[frozenset[Node]]:
    """For each run of a graph, which inputs of the outermost graph some nodes are computed from.

    A loop's body counts as run twice. The nodes do not depend on what varies between its runs.
    """
    inputs = [n for n in ancestors(nodes) if n.op in ("placeholder", "get_attr")]
    if not scope.contexts:
        yield frozenset(inputs)
        return
    for context in {c.call.node: c for c in scope.live}.values():
        call = context.current
        given = (*call.varying, *call.operands)
        seats = dict(zip(call.bodies[context.index].placeholders, given, strict=True))
        operands = [seats[n] for n in inputs if isinstance(seats.get(n), Node)]
        for run in inputs_in_each_run(context.parent, operands):
            yield run
            if context.loops:
                yield run


def is_run_again(scope: Scope, nodes: Iterable[Node]) -> bool:
    """Whether a graph is run more than once on the same inputs of some of its nodes."""
    seen: set[frozenset[Node]] = set()
    for run in inputs_in_each_run(scope, nodes):
        if run in seen:
            return True
        seen.add(run)
    return False


def scopes_of(gm: GraphModule, table: EffectTable) -> list[Scope]:
    """Every graph that a run of ``gm`` runs, bodies before the graphs that run them."""
    found: dict[GraphModule, Scope] = {}
    order: list[Scope] = []

    def visit(module: GraphModule, table: EffectTable) -> Scope:
        scope = found.setdefault(module, Scope(module))
        scope.tables.append(table)
        for call, inner in table.calls.values():
            for index, body in enumerate(call.bodies):
                child = visit(body.module, inner[index])
                child.contexts.append(Context(scope, table, call, index, inner))
        if scope not in order:
            order.append(scope)
        return scope

    visit(gm, table)
    for scope in reversed(order):
        scope.derived = derive(scope.gm, _derived_inputs(scope))
    return order


def _derived_inputs(scope: Scope) -> set[Node]:
    placeholders = [node for node in scope.gm.graph.nodes if node.op == "placeholder"]
    if not scope.contexts:
        return {node for node in placeholders if is_parameter(node)}
    found = set(placeholders)
    for context in scope.contexts:
        outer = context.parent.derived
        given = (*(None for _ in context.call.varying), *context.call.operands)
        found &= {
            placeholder
            for placeholder, operand in zip(placeholders, given, strict=True)
            if operand in outer.nodes or operand in outer.constants
        }
    return found
