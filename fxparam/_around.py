"""Graphs that run in an eager ``cached()`` region, with whose values they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch.fx import GraphModule
from torch.nn import Module

from fxparam import _private, _static
from fxparam._ambient import ambient_mark
from fxparam._stamp import Snapshot
from fxparam.graph.outside import Outside, Stays, all_of, take_outside
from fxparam.scopes import read, training_modes

__all__ = ["InRegion"]


class InRegion:
    """A graph from which the evaluations for the region around it were taken.

    The region has their values, or evaluates as eager code does: once, in front of the graph.

    Args:
        gm: a hoisted graph of Dynamo's.
        inputs: those it is called with the first time.

    Raises:
        torch._dynamo.exc.RestartAnalysis: an evaluation must be read outside of the graph, and will
            be when Dynamo traces it anew.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self._inputs = inputs
        try:
            self._gm, self._outside = take_outside(gm, grad_enabled=torch.is_grad_enabled())
            self._chains = all_of(partial(_chain_of, each, inputs) for each in self._outside)
        except Stays as stays:
            _static.keep_out_of_graphs(*stays.chains)
            _private.restart_trace(str(stays))

    @property
    def count(self) -> int:
        """How many values the graph takes from the region."""
        return len(self._outside)

    def compile(self, inner: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
        """A callable with the inputs of the graph as it was, compiled by ``inner``."""
        compiled = inner(self._gm, [*self._inputs, *(each.value for each in self._outside)])
        chains = list(map(ref, self._chains))

        def run(*args: Any) -> Any:
            # Dynamo's guards, on which this runs, hold the identity of the lists.
            return compiled(*args, *(read(chain()) for chain in chains))  # type: ignore[arg-type]

        return run


def _chain_of(outside: Outside, inputs: Sequence[Any]) -> Module:
    """The parametrization list of an evaluation, if the region would say of it what was traced.

    Raises:
        Stays: it was read in other modes than those in which the graph begins, or from other
            tensors than its own, as by ``functional_call``.
    """
    chain = _static.chain_of(outside.chain)
    if chain is None:
        raise Stays((outside.chain, "it is gone"))
    if outside.training != training_modes(chain) or outside.modes != ambient_mark():
        raise Stays((outside.chain, "modes are switched before it"))
    own = {id(held) for held in Snapshot(chain).objects}
    read = (*(inputs[i] for i in outside.inputs), *outside.attributes)
    if not all(id(value) in own for value in read):
        raise Stays((outside.chain, "it is computed from more than its list holds"))
    return chain
