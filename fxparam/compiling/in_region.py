"""Graphs that run in an eager ``cached()`` region, with whose values they compute."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module

from fxparam._torch.collectives import collectives_of
from fxparam._torch.dynamo import restart_trace, traced_code
from fxparam.graph.passes.take_outside import CannotTakeOut, TakenOut, all_of, take_outside
from fxparam.scopes import under_dynamo
from fxparam.scopes.modes import ambient_mark
from fxparam.scopes.reading import training_modes
from fxparam.scopes.snapshot import Snapshot
from fxparam.scopes.store import Evaluate, Reader, current, known_for, read_all

__all__ = ["FirstReaders", "with_values_of_region"]

_log = logging.getLogger("fxparam")


def with_values_of_region(
    gm: GraphModule,
    inputs: Sequence[Any],
    inner: Callable[..., Any],
    evaluations: Callable[..., Any],
    first: FirstReaders,
) -> Callable[..., Callable[..., Any]]:
    """Return a backend that lets ``inner`` compile the graph without the region's evaluations.

    The region has their values, or evaluates once, in front of the graph. The first graph that
    reads tensors has their evaluations compiled for that, those without effects as one. What the
    backend compiles is called with the inputs of the graph as it was.

    Args:
        gm: a hoisted graph of Dynamo's.
        inputs: those it is called with the first time.
        inner: the backend that compiles what is left.
        evaluations: the one that compiles evaluations.
        first: the frames that have evaluations compiled.

    Raises:
        torch._dynamo.exc.RestartAnalysis: an evaluation must be read outside of the graph, and will
            be when Dynamo traces it anew.
    """
    region = current()
    frozen = region is not None and region.outlives_calls and not torch.is_grad_enabled()
    try:
        rest, outside, alone = take_outside(gm, grad_enabled=torch.is_grad_enabled(), static=frozen)
        chains = all_of(partial(_chain_of, each, inputs) for each in outside)
    except CannotTakeOut as refused:
        under_dynamo.keep_out_of_graphs(*refused.chains)
        restart_trace(str(refused))
    together = bool(collectives_of(gm)) and any(
        collectives_of(alone([i])) for i in range(len(outside))
    )
    _log.info("%d values are those of the cached() region around the graph", len(outside))

    def evaluation(group: list[int], inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = _with_needed(evaluations, alone(group), inputs)
        # A CUDA graph writes its results to the same memory when it is run again.
        copied = frozen and any(outside[i].value.is_cuda for i in group)
        return _copied(compiled) if copied else compiled

    def evaluate(group: list[int], compute: Callable[..., Any], args: Sequence[Any]) -> Evaluate:
        reads = [outside[i].read_by(args) for i in group]
        return Evaluate(partial(compute, *args), reads, outside[group[0]].additive, together)

    def compile(_: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = _with_needed(inner, rest, [*inputs, *(each.value for each in outside)])
        if not outside:
            return compiled
        own = list(map(first.include, chains, outside))
        groups = [
            (group, evaluation(group, inputs) if own[group[0]] else None)
            for group in _groups(outside, own)
        ]
        held = [ref(chains[i]) for group, _ in groups for i in group]
        order = [i for group, _ in groups for i in group]
        places = [order.index(i) for i in range(len(order))]
        originals = list(dict.fromkeys(i for each in outside for i in each.inputs))
        graph = Reader([not outside[i].returned for i in order])

        def run(*args: Any) -> Any:
            # Dynamo's guards, on which this runs, hold the identity of the lists.
            lists: list[Any] = [each() for each in held]
            reads = [args[i] for i in originals]
            values = known_for(graph, lists, reads)
            if values is None:
                each = iter(lists)
                parts = [
                    ([next(each) for _ in group], compute and evaluate(group, compute, args))
                    for group, compute in groups
                ]
                values = read_all(graph, parts, reads)
            return compiled(*args, *(values[i] for i in places))

        return run

    return compile


def _with_needed(
    inner: Callable[..., Any], graph: GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Compile a graph without the tensors among its inputs that it does not read.

    Autograd would call their hooks without a gradient.
    """
    given = graph.graph.find_nodes(op="placeholder")
    needed = [i for i, n in enumerate(given) if n.users or not isinstance(inputs[i], Tensor)]
    for i in {*range(len(given))} - {*needed}:
        graph.graph.erase_node(given[i])
    graph.recompile()
    compiled: Callable[..., Any] = inner(graph, [inputs[i] for i in needed])
    return lambda *args: compiled(*(args[i] for i in needed))


def _groups(outside: list[TakenOut], own: list[bool]) -> Iterator[list[int]]:
    """Yield which evaluations run as one, in order.

    Those without effects do, between others with effects, if this frame has them compiled. A
    gradient comes to all of them from the same ends of the graph.
    """
    for _, run in itertools.groupby(range(len(outside)), lambda i: (outside[i].pure, own[i])):
        together: dict[object, list[int]] = {}
        for i in run:
            each = outside[i]
            key = (each.additive, each.ends) if each.pure and own[i] else i
            together.setdefault(key, []).append(i)
        yield from together.values()


class FirstReaders:
    """Which code has a tensor's evaluation compiled: it reads it first, others find its value."""

    def __init__(self) -> None:
        self._codes: WeakKeyDictionary[Module, dict[object, object]] = WeakKeyDictionary()

    def include(self, chain: Module, outside: TakenOut) -> bool:
        """Check whether the present frame is the first to read a list in the modes of a read.

        The first one stays the first when it is compiled again.
        """
        codes = self._codes.setdefault(chain, {})
        code = traced_code()
        return codes.setdefault((outside.training, outside.modes), code) is code


def _copied(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives copies of what a compiled graph gives."""
    return lambda *args: tuple(each.clone() for each in compiled(*args))


def _chain_of(outside: TakenOut, inputs: Sequence[Any]) -> Module:
    """Return the list of an evaluation, if reading it before the graph gives the same value.

    Raises:
        CannotTakeOut: it was read in other modes than those in which the graph begins, or from
            other tensors than its own, as by ``functional_call``.
    """
    chain = under_dynamo.chain_of(outside.chain)
    if chain is None:
        raise CannotTakeOut((outside.chain, "it is gone"))
    if outside.training != training_modes(chain) or outside.modes != ambient_mark():
        raise CannotTakeOut((outside.chain, "modes are switched before it"))
    own = {id(held) for held in Snapshot(chain).objects}
    if not all(id(value) in own for value in outside.read_by(inputs)):
        raise CannotTakeOut((outside.chain, "it is computed from more than its list holds"))
    return chain
