"""Whether a contestant computes what eager computes: outputs, gradients and buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.programs import Program

__all__ = ["Outcome", "Wrong", "check", "outcome_of"]

# Relative, in the norm of each tensor. Long recurrences amplify the rounding of sums that are made
# in another order; a gradient that is lost, doubled or stale is off by far more.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-1}


class Wrong(Exception):
    """A contestant's results are not eager's."""


@dataclass
class Outcome:
    """What the first step of a program gave, copied."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor] | None
    buffers: dict[str, Tensor] | None


def outcome_of(program: Program) -> Outcome:
    """Run one step; the first one of a program, since a step may write buffers."""
    program.reset()
    outputs = [_copy(t) for t in program.step()]
    gradients, buffers = program.gradients(), program.buffers()
    return Outcome(outputs, _copies(gradients), _copies(buffers))


def check(actual: Outcome, expected: Outcome, dtype: str = "float32") -> None:
    """Compare two outcomes; what ``actual`` does not have (None) is not compared.

    Raises:
        Wrong: naming the first tensor that differs, and by how much.
    """
    if len(actual.outputs) != len(expected.outputs):
        raise Wrong(f"{len(actual.outputs)} outputs, eager gives {len(expected.outputs)}")
    for i, (a, b) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        _same(f"output {i}", a, b, _TOLERANCE[dtype], floor=0.0)
    for kind in ("gradients", "buffers"):
        mine, theirs = getattr(actual, kind), getattr(expected, kind)
        if mine is None:
            continue
        if set(mine) != set(theirs):
            differ = ", ".join(sorted(set(mine) ^ set(theirs)))
            raise Wrong(f"{kind} of {differ}: eager and the contestant do not both have them")
        largest = max((float(t.norm()) for t in theirs.values()), default=0.0)
        for name, b in theirs.items():
            # A gradient that vanishes in theory is rounding in practice, on both sides.
            _same(f"{kind[:-1]} of {name}", mine[name], b, _TOLERANCE[dtype], 1e-4 * largest)


def _same(what: str, a: Tensor, b: Tensor, tolerance: float, floor: float) -> None:
    if a.shape != b.shape:
        raise Wrong(f"{what} has shape {tuple(a.shape)}, eager's has {tuple(b.shape)}")
    apart, scale = float((a - b).norm()), max(float(b.norm()), floor)
    if not apart <= tolerance * scale:  # also for NaN
        raise Wrong(f"{what} is not eager's: off by {apart / (scale or 1.0):.1e} of its norm")


def _copies(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if tensors is None else {name: _copy(t) for name, t in tensors.items()}


def _copy(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64, copy=True)
