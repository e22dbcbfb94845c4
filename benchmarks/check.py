"""Whether a contestant computes what eager computes: outputs, gradients and buffers.

How far apart two right programs are depends on the model: long recurrences amplify the rounding of
sums made in another order. So the measure is how far eager itself is from the same step in float64;
a contestant may be a few times as far. A gradient that is lost, doubled or stale is off by more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Size
from benchmarks.programs import Program, Setting, reference

__all__ = ["Expected", "Outcome", "Wrong", "check", "expected_of", "outcome_of", "outcomes_of"]

_TIMES_EAGER = 4
# What is allowed whatever eager's own error, relative, in the norm of each tensor.
_FLOOR = {"float32": 1e-5, "bfloat16": 1e-2}
# What is not allowed whatever eager's own error: results that chaos has made are no check.
_MOST = {"float32": 1e-2, "bfloat16": 0.5}
# Of the largest gradient's norm: one that vanishes in theory is rounding in practice.
_SMALLEST = 1e-4
# Of a parameter's root mean square, and absolute of inputs: stale ones are seen in bfloat16 too.
_CHANGE = 0.1
_WHEN = ("", " with other inputs", " after the parameters changed")


class Wrong(Exception):
    """A contestant's results are not eager's."""


@dataclass
class Outcome:
    """Copies of what a step gave, under names such as "output 0" and "gradient of cell.weight".

    Attributes:
        missing: parameters without a gradient.
        part: whether only what eager has too is compared.
    """

    tensors: dict[str, Tensor]
    missing: frozenset[str]
    part: bool = False


@dataclass
class Expected:
    """Eager's outcomes, and the same in float64."""

    eager: list[Outcome]
    exact: list[Outcome]
    dtype: str = "float32"


def outcome_of(program: Program) -> Outcome:
    """Run one step."""
    outputs, model = program.step(), program.model
    named = {f"output {i}": t for i, t in enumerate(outputs)}
    for name, p in model.named_parameters():
        if p.grad is not None:
            named[f"gradient of {name}"] = p.grad
    named.update({f"buffer of {name}": t for name, t in model.named_buffers()})
    missing = frozenset(name for name, p in model.named_parameters() if p.grad is None)
    return Outcome({name: _copy(t) for name, t in named.items()}, missing, program.plain)


def outcomes_of(program: Program, first: Outcome | None = None) -> list[Outcome]:
    """Return those of the first step (a step may write buffers), and of later ones.

    A step with other inputs, then one with other parameters: they notice what is kept. Afterwards
    both are as before. A program whose weights are its own by design has no step with other
    parameters, one that computes the others' first step only has neither.
    """
    found = [first or outcome_of(program)]
    if not program.once:
        with _other_inputs(program):
            found.append(outcome_of(program))
        if not program.fixed:
            with _other_parameters(program.model):
                found.append(outcome_of(program))
    return found


@contextmanager
def _other_inputs(program: Program) -> Iterator[None]:
    """The same for each program; whole numbers are exchanged among themselves."""
    before = program.inputs
    program.inputs = tuple(map(_another, before, range(len(before))))
    try:
        yield
    finally:
        program.inputs = before


@contextmanager
def _other_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Other values in the parameters, the same for each program."""
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            size = _CHANGE * p.square().mean().sqrt()
            p.add_(size * _noise(p, zlib.crc32(name.encode())))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])


def _another(x: Tensor, seed: int) -> Tensor:
    if not x.is_floating_point():
        return x.flatten().flip(0).view_as(x)
    return x + _CHANGE * _noise(x, seed)


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def expected_of(case: Case, size: Size, setting: Setting, *, sharing: bool = False) -> Expected:
    """Return what contestants are compared with; ``sharing`` as in :func:`programs.reference`."""
    eager, exact = (
        outcomes_of(reference(case, size, setting, sharing=sharing, exact=exact))
        for exact in (False, True)
    )
    return Expected(eager, exact, setting.dtype)


def check(actual: list[Outcome], expected: Expected) -> None:
    """Compare outcomes; those that ``actual`` does not have are not compared.

    Raises:
        Wrong: naming the first tensor that differs, and by how much.
    """
    steps = zip(actual, expected.eager, expected.exact, _WHEN, strict=False)
    for mine, eager, exact, when in steps:
        own, names = mine.tensors, eager.tensors.keys()
        if mine.part:
            lost = mine.missing - eager.missing
            if lost and any(name.startswith("gradient") for name in names):
                raise Wrong(f"no gradient of {', '.join(sorted(lost))}")
            names = names & own.keys()
        elif names != own.keys():
            raise Wrong(f"eager and the contestant differ in {sorted(names ^ own.keys())[0]}")
        gradients = [float(eager.tensors[n].norm()) for n in names if n.startswith("gradient")]
        smallest = _SMALLEST * max(gradients, default=0.0)
        for name in names:
            floor = smallest if name.startswith("gradient") else 0.0
            three = (own[name], eager.tensors[name], exact.tensors[name])
            _same(name + when, *three, expected.dtype, floor)


def _same(
    what: str, mine: Tensor, eager: Tensor, exact: Tensor, dtype: str, smallest: float
) -> None:
    """``smallest``: what a norm is at least taken to be."""
    if mine.shape != eager.shape:
        raise Wrong(f"{what} has shape {tuple(mine.shape)}, eager's has {tuple(eager.shape)}")
    if not eager.is_floating_point():
        if not torch.equal(mine, eager):
            raise Wrong(f"{what} is not eager's")
        return
    scale = max(float(eager.norm()), smallest)
    apart, own = float((mine - exact).norm()), float((eager - exact).norm())
    allowed = min(_TIMES_EAGER * own + _FLOOR[dtype] * scale, _MOST[dtype] * scale)
    if not apart <= allowed:  # also for NaN
        off, may = (x / (scale or 1.0) for x in (apart, allowed))
        raise Wrong(f"{what} is not eager's: off by {off:.1e} of its norm, {may:.1e} is allowed")


def _copy(t: Tensor) -> Tensor:
    """On the CPU, in float64 but for whole numbers; complex ones as pairs."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)
