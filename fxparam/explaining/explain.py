"""``fxparam.explain``: run a model's capture and the passes, and say what happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxparam._torch.dynamo import break_behind
from fxparam._torch.inductor import generated_code
from fxparam.compiling.backend import Backend
from fxparam.compiling.entry import compile as compile_in_scope
from fxparam.eager.rollback import unchanged
from fxparam.explaining.advice import change_for
from fxparam.explaining.costs import Cost, cost_of, key_of
from fxparam.explaining.example import Example, run
from fxparam.explaining.explanation import Explanation
from fxparam.explaining.facts import (
    Break,
    GraphExplained,
    RefusalExplained,
    Scope,
    TensorExplained,
)
from fxparam.explaining.generated import extern_calls
from fxparam.explaining.picture import Picture, is_own_file, joined, picture
from fxparam.graph.analysis.evaluations import Evaluation, evaluations
from fxparam.graph.passes.hoist import HoistResult
from fxparam.graph.report import Batch, Entry, Refusal, Report

__all__ = ["explain"]


def explain(
    model: Callable[..., Any],
    *args: Any,
    scope: str = "graph",
    inductor: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Say what ``torch.compile(model, backend="fxparam")`` does to a model.

    The model is captured and called once. Its parameters, buffers and random state are as before
    afterwards. All compiled code of the process is forgotten, as by ``torch._dynamo.explain``, and
    is compiled anew when it is called next.

    Args:
        model: a module or function.
        *args: what it is called with.
        scope: ``"graph"``, ``"call"`` or ``"frozen"``, as for :func:`fxparam.compile`.
        inductor: let Inductor compile it, forward and backward, to know which ops it calls and does
            not generate. It takes as long as the first call of the compiled model.
        **kwargs: what it is called with. To give the model a keyword ``scope`` or ``inductor``,
            explain a ``functools.partial`` of it.

    Returns:
        What was captured, shared and refused, and what to change.

    Raises:
        ValueError: there is no such scope.
        TypeError: ``model`` is not callable, or a function that is given a longer scope.

    >>> import torch
    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> layer = weight_norm(torch.nn.Linear(2, 2))
    >>> explanation = explain(lambda x: layer(layer(x)), torch.ones(1, 2))
    >>> [(each.name, each.runs_before, each.runs) for each in explanation.tensors]
    [('weight', 2, 1)]
    """
    modules: list[str] = []
    with ExitStack() as stack:
        inner = "eager"
        if inductor:
            inner, modules = "inductor", stack.enter_context(generated_code())
        recorder = _Recorder(inner)
        compiled = compile_in_scope(model, scope=scope, backend=recorder)
        stack.enter_context(_as_before(model))
        if inductor:
            run(Example(model, args, kwargs), compiled)
        else:
            compiled(*args, **kwargs)
    return recorder.explanation(scope, extern_calls(modules) if inductor else None)


@contextmanager
def _as_before(model: Callable[..., Any]) -> Iterator[None]:
    """Run a block that calls a model, and leave no trace of it."""
    bound = getattr(model, "__self__", None)
    roots = [each for each in (model, bound) if isinstance(each, nn.Module)]
    gradients = [(p, p.grad) for root in roots for p in root.parameters()]
    torch.compiler.reset()
    try:
        with torch.random.fork_rng(), unchanged(*roots):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        torch.compiler.reset()


@dataclass
class _Graph:
    """What was seen of one graph."""

    before: Picture
    costs: dict[str, tuple[Cost, Cost] | None]
    end: Break | None
    report: Report = field(default_factory=Report)
    compiled: list[Picture] = field(default_factory=list)  # what is left, then what goes in front


class _Recorder(Backend):
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
            graph.compiled.append(picture(gm, in_front=shared))
            return inner(gm, inputs)

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

    def explanation(self, scope: str, calls: dict[str, int] | None) -> Explanation:
        """Return what was seen."""
        graphs = tuple(
            GraphExplained(graph.before, joined(graph.compiled), graph.end)
            for graph in self._graphs
        )
        names = dict.fromkeys(e.name for graph in self._graphs for e in graph.report.entries)
        tensors = tuple(self._tensor(name, in_region=scope != "graph") for name in names)
        return Explanation(scope, graphs, tensors, _longer(scope, tensors), calls)

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
            _sum(entry.runs_before for entry in entries),
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
    if not in_region or not entry.kind or entry.name in rest.tensors:
        return entry.runs
    return sum(entry.name in each.tensors for each in in_front)


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
    return Break(reason.strip().splitlines()[0], own[-1] if own else "")


# What a region shares although a graph may not: it evaluates once, with its effects.
_IN_A_REGION = {5}


def _longer(scope: str, tensors: Sequence[TensorExplained]) -> tuple[Scope, ...]:
    """Return the scopes that would evaluate less than the present one does."""
    named = [each for each in tensors if each.kind and each.runs]
    now = sum(each.runs or 0 for each in named)
    if not named or scope == "frozen":
        return ()
    call = sum(
        min(
            each.runs or 0,
            1 + sum(r.count for r in each.refused if r.number not in _IN_A_REGION),
        )
        for each in named
    )
    found = []
    if scope == "graph" and call < now:
        effects = any(r.number in _IN_A_REGION for each in named for r in each.refused)
        found.append(Scope("call", call, now, "fxparam.compile(model, scope='call')", effects))
    pure = [each for each in named if not any(r.number in _IN_A_REGION for r in each.refused)]
    kept = now - sum(each.runs or 0 for each in pure)
    if torch.is_grad_enabled():
        step = 8 * kept + len(pure)
        found.append(
            Scope("step", step, 8 * now, "fxparam.accumulate(model) around 8 micro-batches")
        )
    else:
        how = "fxparam.compile(model, scope='frozen'), from the second call on,"
        found.append(Scope("frozen", kept, now, how))
    return tuple(each for each in found if each.runs < each.now)
