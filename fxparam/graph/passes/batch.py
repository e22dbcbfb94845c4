"""Batching: the same computation of many tensors becomes one computation of their stack.

    w0 = exp(p0); h = g(w0, h)           w0, w1, w2 = unbind(exp(stack(p0, p1, p2)))
    w1 = exp(p1); h = g(w1, h)     ->    h = g(w0, h)
    w2 = exp(p2); h = g(w2, h)           h = g(w1, h)
                                         h = g(w2, h)

The rest of a computation is followed to the batch by ``torch.func.vmap``'s rules, traced to plain
ops in front of autograd, so that backward is one for all as well. This is done in the outermost
graph alone, where evaluations have been moved. The batch comes where the first of its results was,
if every input is there by then, and reads there what each member would have read later.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule, Node

from fxparam._torch.fx import copy_nodes, op_name
from fxparam._torch.vmap import CannotBatch
from fxparam.graph.analysis.computations import Computation, computations, key_of_computation
from fxparam.graph.analysis.derived import derive, is_parameter
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.evaluations import name_of
from fxparam.graph.analysis.gradients import ends_reached
from fxparam.graph.analysis.held_bytes import held_bytes
from fxparam.graph.analysis.nesting import inputs_kept_apart, levels_of
from fxparam.graph.passes.batch_gains import Gain, gain_of
from fxparam.graph.passes.copy_aliases import copy_aliases
from fxparam.graph.passes.hoist import HoistResult
from fxparam.graph.passes.vectorize import vectorize
from fxparam.graph.report import Batch
from fxparam.graph.rules import (
    does_the_value_escape,
    has_effects,
    is_the_value_written,
    may_a_gradient_be_taken,
)
from fxparam.marks import is_for_a_region_around

__all__ = ["Batching", "batch", "batched"]

# What a node of a batch says of itself, without the marks of what it was made from.
_META = ("example_value", "nn_module_stack", "stack_trace")


@dataclass
class Batching:
    """Attributes:
    batches: the evaluations that became one, and those that could not.
    modified: whether the graph changed.
    apart: inputs, of which the graph writes some, that were relied on to be different memory.
    """

    batches: list[Batch] = field(default_factory=list)
    modified: bool = False
    apart: tuple[Node, ...] = ()


def batch(
    gm: GraphModule,
    *,
    grad_enabled: bool | None = None,
    max_bytes: float = float("inf"),
    lowered: bool = False,
    own_results: bool = True,
) -> Batching:
    """Run the same evaluations of different tensors as one, where that is right and worthwhile.

    Args:
        gm: a hoisted graph of Dynamo's; changed in place.
        grad_enabled: the grad mode in which the graph is called. Autocast is then as it is now.
        max_bytes: a batch needs no more memory at its peak.
        lowered: whether ops of batches will be lowered.
        own_results: whether each result of the graph has memory and gradients of its own. Else
            the caller sees to that, and they may be results of one batch.
    """
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if is_parameter(n)]
    alike: dict[Hashable, list[Computation]] = {}
    for found in computations(gm, derive(gm, inputs)):
        alike.setdefault(key_of_computation(gm, found), []).append(found)
    alike = {key: members for key, members in alike.items() if len(members) > 1}
    if not alike:
        return Batching()
    batcher = _Batcher(gm, grad_enabled, own_results)
    return batcher.run(alike.values(), max_bytes, lowered)


def batched(
    result: HoistResult, *, grad_enabled: bool, max_bytes: float, lowered: bool
) -> HoistResult:
    """Batch a hoisted graph, and add to what is said of it, as ``batch`` does."""
    found = batch(
        result.graph_module, grad_enabled=grad_enabled, max_bytes=max_bytes, lowered=lowered
    )
    report = replace(result.report, batches=tuple(found.batches))
    if not found.modified:
        return replace(result, report=report)
    apart = tuple(dict.fromkeys((*result.apart, *found.apart)))
    return replace(result, report=report, modified=True, apart=apart)


class _Batcher:
    """The facts about one graph, and what was done to it.

    Attributes:
        place: each node's place in the graph; a batch's nodes are a little before the place at
            which they were put in.
        now: for each result that a batch replaced, the node that has its value.
    """

    def __init__(self, gm: GraphModule, grad_enabled: bool | None, own_results: bool) -> None:
        self.gm, self.grad_enabled = gm, grad_enabled
        self.table = analyze(gm, grad_enabled=grad_enabled, autocast_now=True)
        self.levels = levels_of(gm, self.table)
        self.entry = self.table.of[next(iter(gm.graph.nodes))].modes
        self.held = held_bytes(gm.graph)
        reached = ends_reached(gm.graph, self.table)
        self.own_results = own_results
        self.reached = reached if own_results else dict.fromkeys(reached, 1)
        # ``w.as_strided(size, stride, 0)`` counts from the beginning of the memory of ``w``.
        self.placed = frozenset[int]().union(
            *(
                table.of[node].reads
                for level in self.levels
                for table in level.tables
                for node in table.of
                if op_name(node).startswith("as_strided")
            )
        )
        self.place: dict[Node, float] = dict(self.table.position)
        self.now: dict[Node, Node] = {}

    def run(self, alike: Iterable[list[Computation]], max_bytes: float, lowered: bool) -> Batching:
        self.max_bytes, self.lowered = max_bytes, lowered
        result = Batching()
        apart = inputs_kept_apart(self.levels)
        for members in alike:
            for together in self._groups(members):
                result.batches += self._batch(together)
        result.modified = any(not made.refused for made in result.batches)
        if result.modified:
            result.apart = apart
            self._copy_operands()
            self.gm.graph.lint()
            self.gm.recompile()
        return result

    def _copy_operands(self) -> None:
        """Copy operands of one loop or branch that are results of one batch."""
        if len(self.levels) > 1:
            table = analyze(self.gm, grad_enabled=self.grad_enabled, autocast_now=True)
            for module in copy_aliases(levels_of(self.gm, table)):
                module.recompile()

    def _groups(self, members: list[Computation]) -> Iterator[list[Computation]]:
        """Yield those that may become one, where the first of their results is."""
        kinds: dict[Hashable, list[Computation]] = {}
        for each in members:
            if self._may_be_moved(each):
                ends = tuple(self.reached.get(node, 0) for node in each.results)
                kinds.setdefault(ends, []).append(each)
        for rest in kinds.values():
            rest.sort(key=lambda each: self.place[each.results[0]])
            while len(rest) > 1:
                place = rest[0].results[0]
                taken = [each for each in rest if self._may_run_at(place, each)]
                if len(taken) > 1:
                    yield taken
                rest = [each for each in rest[1:] if each not in taken]

    def _may_be_moved(self, found: Computation) -> bool:
        """Check that a computation is the same elsewhere, and that nobody tells its results apart.

        A result that is written, leaves the graph, or is read by its place in memory, has memory of
        its own.
        """
        table = self.table
        return all(
            has_effects(table, node) is None
            and table.of[node].modes == self.entry
            and not may_a_gradient_be_taken(table, node)
            and not is_for_a_region_around(node)
            for node in found.nodes
        ) and not any(
            is_the_value_written(table, node, node)
            or (self.own_results and does_the_value_escape(table, node, node))
            or table.of[node].storages & self.placed
            for node in found.results
        )

    def _may_run_at(self, place: Node, found: Computation) -> bool:
        """Check that a computation's inputs are there at a place, and are the same there."""
        inputs = (self.now.get(node, node) for node in found.inputs)
        if any(n.op != "get_attr" and self.place[n] >= self.place[place] for n in inputs):
            return False
        return not any(self._is_written_between(place, node) for node in found.nodes)

    def _is_written_between(self, place: Node, node: Node) -> bool:
        """Rule 2: is what a node reads written between a place and its own?

        Where a check of the node may raise an error, any write there counts.
        """
        effects = self.table.of[node]
        first, last = sorted((self.place[place], self.place[node]))
        reads = frozenset(self.table.writers) if effects.raises else effects.reads
        return self.table.written(reads, first, last)

    def _batch(self, members: list[Computation]) -> Iterator[Batch]:
        """Let batches take the place of computations, and yield what became of them."""
        names = tuple(map(self._name, members))
        if len({each.inputs for each in members}) == 1:  # evaluations that rules keep apart
            return
        try:
            gain = self._gain(members)
            if gain is None:
                return
            if gain.least is None or len(members) < gain.least:
                raise CannotBatch("not worthwhile at this size")
            most = gain.most(self.held, self.max_bytes)
            if most < gain.least:
                raise CannotBatch("it would need more memory than the graph holds")
        except CannotBatch as refused:
            yield Batch(names, str(refused))
            return
        for part in _parts(members, most):
            if len(part) > 1:
                yield self._one(part)

    def _gain(self, members: list[Computation]) -> Gain | None:
        """Return what a batch gains, seen on one of the first two members."""
        _, traced = self._traced(members[:2])
        return gain_of(traced.graph.nodes, 2, lowered=self.lowered)

    def _traced(self, members: list[Computation]) -> tuple[list[Node], GraphModule]:
        """Return the inputs of a batch, and its ops, in a graph by themselves."""
        inputs = [[self.now.get(n, n) for n in each.inputs] for each in members]
        seats = [[*n] if len({*n}) > 1 else [n[0]] for n in zip(*inputs, strict=True)]
        traced = vectorize(members, inputs[0], seats)
        return [node for seat in seats for node in seat], traced

    def _one(self, members: list[Computation]) -> Batch:
        """Let one batch take the place of computations."""
        names = tuple(map(self._name, members))
        try:
            inputs, traced = self._traced(members)
        except CannotBatch as refused:
            return Batch(names, str(refused))
        self._put_in(traced, members, inputs)
        return Batch(names)

    def _name(self, found: Computation) -> str:
        return name_of(self.levels[-1], found.results[0])

    def _put_in(self, traced: GraphModule, members: list[Computation], inputs: list[Node]) -> None:
        """Put the ops of a batch in front of the first result, and erase the computations."""
        place = members[0].results[0]
        for node in inputs:
            if node.op == "get_attr" and self.place[node] >= self.place[place]:
                place.prepend(node)
        copies: dict[Node, Node] = dict(
            zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True)
        )
        ops = [node for node in traced.graph.nodes if node.op == "call_function"]
        with self.gm.graph.inserting_before(place):
            copy_nodes(ops, self.gm.graph, copies)
        for node in ops:
            where = {**place.meta, **node.meta}
            copies[node].meta = {key: where[key] for key in _META if key in where}
            self.place[copies[node]] = self.place[place] - 0.5
        values = [copies[node] for node in traced.graph.output_node().all_input_nodes]
        for old, new in zip((r for each in members for r in each.results), values, strict=True):
            old.replace_all_uses_with(new)
            self.now[old] = new
        for each in members:
            for node in reversed(each.nodes):
                self.gm.graph.erase_node(node)


def _parts(members: list[Computation], most: int) -> list[list[Computation]]:
    """Divide computations into parts of at most so many, of sizes that differ by at most one."""
    count = -(-len(members) // most)
    return [
        members[i * len(members) // count : (i + 1) * len(members) // count] for i in range(count)
    ]
