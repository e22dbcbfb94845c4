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

__all__ = ["Expected", "Outcome", "Wrong", "check", "expected_of", "outcomes_of"]

_TIMES_EAGER = 4
# What is allowed whatever eager's own error, relative, in the norm of each tensor.
_FLOOR = {"float32": 1e-5, "bfloat16": 1e-2}
# What is not allowed whatever eager's own error: results that chaos has made are no check.
_MOST = {"float32": 1e-2, "bfloat16": 0.5}
# Where the model does not run in float64: relative to eager.
_FIXED = {"float32": 2e-4, "bfloat16": 5e-2}
# Of the largest gradient's norm: one that vanishes in theory is rounding in practice.
_SMALLEST = 1e-4
# Of a parameter's root mean square, and absolute of inputs: stale ones are seen in bfloat16 too.
_CHANGE = 0.1
_WHEN = ("", " with other inputs", " after the parameters changed")


class Wrong(Exception):
    """A contestant's results are not eager's."""


@dataclass
class Outcome:
    """What a step gave, copied.

    Attributes:
        names: of the model's parameters and buffers.
        without: names of parameters that got no gradient.
        part: whether these are not all of eager's, and only what both have is compared.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] | None
    names: frozenset[str]
    without: frozenset[str]
    part: bool = False


@dataclass
class Expected:
    """Eager's outcomes, and the same in float64 if the model runs in it."""

    eager: list[Outcome]
    exact: list[Outcome] | None
    dtype: str = "float32"


def outcomes_of(program: Program) -> list[Outcome]:
    """The first step of a program, for a step may write buffers; then the later ones."""
    return [outcome_of(program), *later_outcomes_of(program)]


def later_outcomes_of(program: Program) -> list[Outcome]:
    """A step with other inputs, then one with other parameters: they notice what is kept.

    Afterwards inputs and parameters are as before. A program whose weights are its own by design
    has no step with other parameters, one that computes the others' first step only has neither.
    """
    if program.once:
        return []
    with _other_inputs(program):
        found = [outcome_of(program)]
    if not program.fixed:
        with _other_parameters(program.model):
            found.append(outcome_of(program))
    return found


def outcome_of(program: Program) -> Outcome:
    """Run one step."""
    program.reset()
    outputs = [_copy(t) for t in program.tensors(program.step())]
    buffers, model = program.buffers(), program.model
    parameters = frozenset(name for name, _ in model.named_parameters())
    gradients = _copies(program.gradients())
    return Outcome(
        outputs,
        gradients,
        None if buffers is None else _copies(buffers),
        parameters | {name for name, _ in model.named_buffers()},
        parameters - gradients.keys(),
        program.plain,
    )


@contextmanager
def _other_inputs(program: Program) -> Iterator[None]:
    """The same for each program; whole numbers are exchanged among themselves."""
    before = program.inputs
    program.give(tuple(map(_another, before, range(len(before)))))
    try:
        yield
    finally:
        program.give(before)


def _another(x: Tensor, seed: int) -> Tensor:
    if not x.is_floating_point():
        return x.flatten().flip(0).view_as(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + _CHANGE * noise


@contextmanager
def _other_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Other values in the parameters that train, the same for each program."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad():
        for name, p in trained.items():
            source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(p.shape, generator=source).to(p)
            p.add_(_CHANGE * p.square().mean().sqrt() * noise)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(before[name])


def expected_of(case: Case, size: Size, setting: Setting, *, sharing: bool = False) -> Expected:
    """What contestants are compared with; ``sharing`` as in :func:`programs.reference`."""
    eager = outcomes_of(reference(case, size, setting, sharing=sharing))
    exact: list[Outcome] | None
    try:
        exact = outcomes_of(reference(case, size, setting, sharing=sharing, exact=True))
    except Exception:  # a model may name its dtype, and a device may lack this one
        exact = None
    return Expected(eager, exact, setting.dtype)


def check(actual: list[Outcome], expected: Expected) -> None:
    """Compare outcomes; those that ``actual`` does not have are not compared.

    Raises:
        Wrong: naming the first tensor that differs, and by how much.
    """
    for i, (mine, eager) in enumerate(zip(actual, expected.eager, strict=False)):
        exact = expected.exact[i] if expected.exact else None
        _check_step(mine, eager, exact, expected.dtype, _WHEN[i])


def _check_step(
    mine: Outcome, eager: Outcome, exact: Outcome | None, dtype: str, when: str
) -> None:
    if len(mine.outputs) != len(eager.outputs):
        raise Wrong(f"{len(mine.outputs)} outputs, eager gives {len(eager.outputs)}")
    for i, (a, b) in enumerate(zip(mine.outputs, eager.outputs, strict=True)):
        _same(f"output {i}{when}", a, b, exact.outputs[i] if exact else None, dtype)
    both = mine.names & eager.names if mine.part else None
    for kind in ("gradient", "buffer"):
        if kind == "gradient" and mine.part and eager.gradients and mine.without - eager.names:
            raise Wrong(f"gradients of {', '.join(sorted(mine.without - eager.names))}: none")
        own, theirs = _named(mine, kind, both), _named(eager, kind, both)
        right = _named(exact, kind, both) if exact else None
        if own is None or theirs is None:
            continue
        if set(own) != set(theirs):
            differ = ", ".join(sorted(set(own) ^ set(theirs)))
            raise Wrong(f"{kind}s of {differ}: eager and the contestant do not both have them")
        smallest = _SMALLEST * max((float(t.double().norm()) for t in theirs.values()), default=0.0)
        for name, b in theirs.items():
            what = f"{kind} of {name}{when}"
            _same(what, own[name], b, right[name] if right else None, dtype, smallest)


def _named(outcome: Outcome, kind: str, names: frozenset[str] | None) -> dict[str, Tensor] | None:
    found = outcome.gradients if kind == "gradient" else outcome.buffers
    if found is None or names is None:
        return found
    return {name: t for name, t in found.items() if name in names}


def _same(
    what: str, mine: Tensor, eager: Tensor, exact: Tensor | None, dtype: str, smallest: float = 0.0
) -> None:
    """``smallest``: what a norm is at least taken to be."""
    if mine.shape != eager.shape:
        raise Wrong(f"{what} has shape {tuple(mine.shape)}, eager's has {tuple(eager.shape)}")
    if not eager.is_floating_point():
        if not torch.equal(mine, eager):
            raise Wrong(f"{what} is not eager's")
        return
    scale = max(float(eager.norm()), smallest)
    if exact is None:
        apart, allowed = float((mine - eager).norm()), _FIXED[dtype] * scale
    else:
        apart, own = float((mine - exact).norm()), float((eager - exact).norm())
        allowed = min(_TIMES_EAGER * own + _FLOOR[dtype] * scale, _MOST[dtype] * scale)
    if not apart <= allowed:  # also for NaN
        off, may = (x / (scale or 1.0) for x in (apart, allowed))
        raise Wrong(f"{what} is not eager's: off by {off:.1e} of its norm, {may:.1e} is allowed")


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(t) for name, t in tensors.items()}


def _copy(t: Tensor) -> Tensor:
    """On the CPU, in float64 but for whole numbers; complex ones as pairs."""
    t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t)
    return t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)
