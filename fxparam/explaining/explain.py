"""``fxparam.explain``: run a model's capture and the passes, and say what happened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxparam._torch.dynamo import break_behind, breaks_counted
from fxparam._torch.inductor import generated_code
from fxparam._torch.names import tree_flatten
from fxparam.compiling.backend import Backend
from fxparam.compiling.entry import compile as compile_in_scope
from fxparam.compiling.scoped import SCOPES
from fxparam.eager.register import is_parametrized
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
from fxparam.scopes.models import adopt_models

__all__ = ["explain"]


def explain(
    model: Callable[..., Any],
    *args: Any,
    scope: str = "graph",
    inductor: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Say what ``torch.compile(model, backend="fxparam")`` does to a model.

    The model is captured and called once. Parameters, buffers and the random state are as before
    afterwards, of a module and of modules that a function holds. All compiled code of the process
    is forgotten, as by ``torch._dynamo.explain``, and is compiled anew when it is called next.

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
        TypeError: ``model`` is not callable, or a function without modules that is given a longer
            scope.

    >>> import torch
    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> layer = weight_norm(torch.nn.Linear(2, 2))
    >>> explanation = explain(lambda x: layer(layer(x)), torch.ones(1, 2))
    >>> [(each.name, each.runs_before, each.runs) for each in explanation.tensors]
    [('layer.weight', 2, 1)]
    """
    generated: list[str] = []
    roots = tuple(_modules_of(model))
    if scope in SCOPES:
        adopt_models(roots)  # for good, hence not undone below
    with ExitStack() as stack:
        if inductor:
            generated = stack.enter_context(generated_code())
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        stack.enter_context(_as_before(roots, inputs))
        recorder = _Recorder("inductor" if inductor else "eager")
        models = () if isinstance(model, nn.Module) or scope not in SCOPES else roots
        compiled = compile_in_scope(model, scope=scope, models=models, backend=recorder)
        if inductor:
            leaves = {id(x): x for x in (*_parameters(roots), *inputs) if x.requires_grad}
            run(Example(model, args, kwargs), compiled, list(leaves.values()))
        else:
            compiled(*args, **kwargs)
        breaks = breaks_counted()
    calls = extern_calls(generated) if inductor else None
    return recorder.explanation(scope, roots, breaks, calls)


def _modules_of(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that a model is, is bound to, or holds as a function does."""
    held: list[Any] = []
    if isinstance(model, nn.Module):
        held = [model]
    elif isinstance(model, partial):
        for each in (model.func, *model.args, *model.keywords.values()):
            yield from _modules_of(each)
    elif isinstance(model, FunctionType):
        around = inspect.getclosurevars(model)
        held = [*around.nonlocals.values(), *around.globals.values()]
    else:
        owner = model.__self__ if isinstance(model, MethodType) else model
        held = [owner, *getattr(owner, "__dict__", {}).values()]
    yield from (each for each in held if isinstance(each, nn.Module))


def _parameters(roots: Sequence[nn.Module]) -> Iterator[Tensor]:
    for root in roots:
        yield from root.parameters()


@contextmanager
def _as_before(roots: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Run a block that calls a model, and leave no trace of it."""
    torch.compiler.reset()
    gradients = [(x, x.grad) for x in (*_parameters(roots), *inputs) if x.is_leaf]
    try:
        with torch.random.fork_rng(), unchanged(*roots):
            yield
    finally:
        for tensor, gradient in gradients:
            tensor.grad = gradient
        torch.compiler.reset()


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
        breaks: Sequence[str],
        calls: dict[str, int] | None,
    ) -> Explanation:
        """Return what was seen."""
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
        unseen = tuple(name for name in _parametrized(roots) if not _is_among(name, names))
        known = {each.end.reason for each in graphs if each.end is not None}
        left = tuple(dict.fromkeys(map(_first_line, breaks)).keys() - known)
        return Explanation(
            scope, graphs, tensors, _longer(scope, tensors), calls, unseen, tuple(sorted(left))
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
        for name, module in root.named_modules():
            if is_parametrized(module):
                yield from (f"{name}.{each}".strip(".") for each in module.parametrizations)


def _is_among(name: str, names: Collection[str]) -> bool:
    """Check whether a tensor is among those of graphs, which may have a prefix or none."""
    return any(each == name or each.endswith(f".{name}") for each in names)


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
    pure = [each for each in named if not each.refused]
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
