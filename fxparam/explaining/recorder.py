"""A backend that keeps what it sees, and says it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxparam._torch.dynamo import break_behind
from fxparam.compiling.backend import Backend
from fxparam.eager.classes import chains_of
from fxparam.explaining.advice import change_for
from fxparam.explaining.costs import Cost, cost_of, key_of
from fxparam.explaining.explanation import Explanation
from fxparam.explaining.facts import Break, GraphExplained, RefusalExplained, TensorExplained
from fxparam.explaining.longer_scopes import longer_scopes
from fxparam.explaining.picture import Picture, is_own_file, joined, picture
from fxparam.graph.analysis.evaluations import Evaluation, evaluations
from fxparam.graph.passes.hoist import HoistResult
from fxparam.graph.report import Batch, Entry, Refusal, Report

__all__ = ["Recorder"]


@dataclass
class _Graph:
    """What was seen of one graph."""

    before: Picture
    costs: dict[str, tuple[Cost, Cost] | None]
    end: Break | None
    report: Report = field(default_factory=Report)
    compiled: list[_Compiled] = field(default_factory=list)  # what is left, then what is in front


@dataclass
class _Compiled:
    """A graph that was given to the inner backend, and how many times it ran."""

    picture: Picture
    calls: int = 0


class Recorder(Backend):
    """A backend that keeps what it sees."""

    def __init__(self, inner: str) -> None:
        super().__init__(inner)
        self._graphs: list[_Graph] = []
        self._known: dict[object, tuple[Cost, Cost] | None] = {}

    def _share(
        self, gm: GraphModule, example_inputs: Sequence[Any], *backends: Any
    ) -> tuple[HoistResult, Callable[..., Any]]:
        graph = _Graph(picture(gm), self._costs(gm), _break_of(gm))
        found = super()._share(gm, example_inputs, *backends)
        self._graphs.append(graph)  # not before: Dynamo may trace the frame anew
        return found

    def _record(self, result: HoistResult) -> None:
        super()._record(result)
        self._graphs[-1].report = result.report

    def _configured(self, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
        inner = super()._configured(mode, options)

        def recorded(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            if not self.reads_marks:  # a pass failed, or all are switched off
                self._graphs.append(_Graph(picture(gm), {}, _break_of(gm)))
            graph = self._graphs[-1]
            shared = {e.name for e in graph.report.entries if e.kind and e.runs != e.runs_before}
            seen = _Compiled(picture(gm, in_front=shared))
            graph.compiled.append(seen)
            compiled = inner(gm, inputs)

            def counted(*args: Any) -> Any:
                seen.calls += 1
                return compiled(*args)

            return counted

        return recorded

    def _costs(self, gm: GraphModule) -> dict[str, tuple[Cost, Cost] | None]:
        """Return what an evaluation of each parametrized tensor costs."""
        first: dict[str, Evaluation] = {}
        for body in (m for m in gm.modules() if isinstance(m, GraphModule)):
            for each in evaluations(body.graph):
                first.setdefault(each.name, each)
        return {name: self._cost(each) for name, each in first.items()}

    def _cost(self, evaluation: Evaluation) -> tuple[Cost, Cost] | None:
        """Return the cost of an evaluation, computed once for all that are alike."""
        key = key_of(evaluation)
        if key not in self._known:
            self._known[key] = cost_of(evaluation)
        return self._known[key]

    def explanation(
        self,
        scope: str,
        roots: Sequence[nn.Module],
        named_by_root: bool,
        breaks: Sequence[str],
        calls: dict[str, int] | None,
    ) -> Explanation:
        """Return what was seen.

        Args:
            scope: the one it was compiled in.
            roots: modules of the model.
            named_by_root: names in graphs begin at the one root, else at a variable of a function.
            breaks: reasons of breaks in the call.
            calls: ops that Inductor calls.
        """
        graphs = tuple(
            GraphExplained(
                graph.before,
                joined([each.picture for each in graph.compiled]),
                graph.end,
                graph.compiled[0].calls,
            )
            for graph in self._graphs
        )
        names = dict.fromkeys(e.name for graph in self._graphs for e in graph.report.entries)
        tensors = tuple(self._tensor(name, in_region=scope != "graph") for name in names)
        unseen = tuple(
            name for name in _parametrized(roots) if not _is_among(name, names, named_by_root)
        )
        known = {each.end.reason for each in graphs if each.end is not None}
        left = tuple(dict.fromkeys(map(_first_line, breaks)).keys() - known)
        return Explanation(
            scope,
            graphs,
            tensors,
            longer_scopes(scope, tensors),
            calls,
            unseen,
            tuple(sorted(left)),
        )

    def _tensor(self, name: str, *, in_region: bool) -> TensorExplained:
        """Return what was seen of a tensor in all graphs."""
        parts = [
            (graph, entry)
            for graph in self._graphs
            for entry in graph.report.entries
            if entry.name == name
        ]
        entries = [entry for _, entry in parts]
        costs = next((found for g, _ in parts if (found := g.costs.get(name))), (None, None))
        batches = [b for g, _ in parts for b in g.report.batches if name in b.names]
        return TensorExplained(
            name,
            next((entry.kind for entry in entries if entry.kind), ()),
            sum(entry.accesses for entry in entries),
            _sum(_times(entry.runs_before, graph.compiled[0].calls) for graph, entry in parts),
            _sum(_runs(*part, in_region=in_region) for part in parts),
            tuple(dict.fromkeys(place for entry in entries for place in entry.hoisted_from)),
            tuple(_explained(refusal) for entry in entries for refusal in entry.refused),
            tuple(dict.fromkeys(op for entry in entries for op in entry.lowered)),
            _batched_with(name, batches),
            next((batch.refused for batch in batches if batch.refused), ""),
            *costs,
        )


def _runs(graph: _Graph, entry: Entry, *, in_region: bool) -> int | None:
    """Return how many evaluations of a tensor are left, those in front of the graph included."""
    rest, *in_front = graph.compiled
    if not in_region or not entry.kind or entry.name in rest.picture.tensors:
        return _times(entry.runs, rest.calls)
    return sum(each.calls for each in in_front if entry.name in each.picture.tensors)


def _times(runs: int | None, calls: int) -> int | None:
    return None if runs is None else runs * calls


def _parametrized(roots: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the names of the parametrized tensors of modules."""
    for root in roots:
        for path, module in root.named_modules():
            yield from (f"{path}.{name}".strip(".") for name in chains_of(module) or ())


def _is_among(name: str, names: Collection[str], named_by_root: bool) -> bool:
    """Check whether a tensor is among those of graphs."""
    return name in names or not named_by_root and any(e.endswith(f".{name}") for e in names)


def _sum(numbers: Iterator[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def _batched_with(name: str, batches: list[Batch]) -> tuple[str, ...]:
    together = (each for batch in batches if not batch.refused for each in batch.names)
    return tuple(dict.fromkeys(each for each in together if each != name))


def _explained(refusal: Refusal) -> RefusalExplained:
    rule = refusal.rule
    return RefusalExplained(
        rule.name, rule.number, rule.value, refusal.count, refusal.where, change_for(rule)
    )


def _break_of(gm: GraphModule) -> Break | None:
    found = break_behind(gm)
    if found is None:
        return None
    reason, frames = found
    own = [f"{file}:{line}" for file, line in frames if not is_own_file(file)]
    return Break(_first_line(reason), own[-1] if own else "")


def _first_line(reason: str) -> str:
    return reason.strip().partition("\n")[0]
