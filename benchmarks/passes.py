"""Times the passes within the compilation they are part of: they grow linearly.

Two kinds of captured graph: one weight evaluated again and again, and as many weights as there are
evaluations, which share nothing though all look alike. A fresh process times a cold
``torch.compile`` of a training step, and in it all that fxparam does to the graphs.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import fxparam
from benchmarks.process import call

__all__ = ["KINDS", "measure", "rows"]

_WIDTH = 8
_PLAN = [
    *(
        (kind, nodes, "aot_eager")
        for kind in ("repeated", "distinct")
        for nodes in (500, 2000, 8000)
    ),
    *(("repeated", nodes, "inductor") for nodes in (500, 2000)),
]
# What the backend runs on each graph, or hands to Inductor to run on each, as its file names it.
_PASSES = ("settle", "hoist", "mark_for_partitioner", "show_what_bodies_pass_on")


def _skew(x: Tensor) -> Tensor:
    a = torch.tril(x, -1)
    a = a - a.mT
    return a + 0.5 * (a @ a)


class _Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _skew(x)


class _Repeated(nn.Module):
    """One parametrized weight, read at each step."""

    per_access = 8

    def __init__(self, accesses: int) -> None:
        super().__init__()
        self.accesses = accesses
        self.layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
        register_parametrization(self.layer, "weight", _Skew())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.accesses):
            x = torch.tanh(self.layer(x))
        return x


class _Distinct(nn.Module):
    """A weight for each step, all computed alike: there is nothing to share.

    They are parts of one parameter: Dynamo takes minutes for the guards of thousands of modules.
    """

    per_access = 9

    def __init__(self, accesses: int) -> None:
        super().__init__()
        self.originals = nn.Parameter(torch.randn(accesses, _WIDTH, _WIDTH) * _WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.originals)):
            x = torch.tanh(nn.functional.linear(x, _skew(self.originals[i])))
        return x


KINDS: dict[str, Any] = {"repeated": _Repeated, "distinct": _Distinct}


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    """Collect the seconds of each pass."""
    found: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                found.append(time.perf_counter() - start)

        return run

    module = fxparam.compiling.backend
    with mock.patch.multiple(module, **{n: timed(getattr(module, n)) for n in _PASSES}):
        yield found


def measure(kind: str, nodes: int, inner: str) -> dict[str, Any]:
    """Return the seconds of a cold compilation of about so many nodes, and of the passes in it."""
    backend = fxparam.backend(inner)
    torch.compile(lambda x: x.tanh(), backend=backend)(torch.ones(2, requires_grad=True))
    model = KINDS[kind](max(1, nodes // KINDS[kind].per_access))
    compiled = torch.compile(model, backend=backend)
    with _timed() as seconds:
        start = time.perf_counter()
        compiled(torch.randn(4, _WIDTH)).sum().backward()
        total = time.perf_counter() - start
    found = {"kind": kind, "nodes": nodes, "inner": inner}
    return found | {"passes": sum(seconds), "compile": total}


def rows(limit: float) -> Iterator[dict[str, Any]]:
    for kind, nodes, inner in _PLAN:
        job = {"kind": kind, "nodes": nodes, "inner": inner}
        cold = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        yield job | call("benchmarks.passes:measure", limit, cold, **job)
