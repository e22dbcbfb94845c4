"""Sequences of registrations, assignments and removals, run step by step.

A step that raises leaves the module as it was: class, tensors, parametrizations, values. Any other
step is one that torch takes as well, with the same value and the same names in the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.utils.parametrize as of_torch
from torch import Tensor, nn

import fxparam.parametrize as ours

SIZE = 3


class Scaled(nn.Module):
    """One original, one value of its kind."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, y: Tensor) -> Tensor:
        return y / 2


class Sine(nn.Module):
    """No right inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Sum(nn.Module):
    """Two originals."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 2 * b

    def right_inverse(self, y: Tensor) -> tuple[Tensor, ...]:
        return y - 2, torch.ones_like(y)


class AnySum(nn.Module):
    """Any number of originals; two of them where it is first."""

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts).sum(0)

    def right_inverse(self, y: Tensor) -> tuple[Tensor, ...]:
        return y / 2, y / 2


class Pair(nn.Module):
    """Takes two tensors, and says nothing of where they come from."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Doubled(nn.Module):
    """Changes the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Row(nn.Module):
    """Changes the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


class Wider(nn.Module):
    """Its right inverse changes the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :SIZE]

    def right_inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y, y], -1)


class Odd(nn.Module):
    """Its right inverse returns no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def right_inverse(self, y: Tensor) -> Any:
        return "no tensor"


class Counts(nn.Module):
    """Counts its evaluations, and changes the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)  # type: ignore[operator, union-attr]
        return x.double()


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("fails")


KINDS = (Scaled, Sine, Sum, AnySum, Pair, Doubled, Row, Wider, Odd, Counts, Fails)
STORED = ("parameter", "frozen", "buffer")


@dataclass(frozen=True)
class Register:
    """Attributes:
    kind: an index of ``KINDS``.
    unsafe: as the argument.
    again: the very parametrization that was registered last, if there is one.
    """

    kind: int
    unsafe: bool
    again: bool


@dataclass(frozen=True)
class Assign:
    """Attributes:
    shaped: whether the new value has the shape of the old one.
    """

    shaped: bool


@dataclass(frozen=True)
class Remove:
    """Attributes:
    leave_parametrized: as the argument.
    """

    leave_parametrized: bool


@dataclass(frozen=True)
class Train:
    """Attributes:
    mode: as the argument.
    """

    mode: bool


Step = Register | Assign | Remove | Train


def check(stored: str, steps: Sequence[Step]) -> int:
    """Run the steps on two equal modules, one of them torch's; return how many were accepted.

    Raises:
        AssertionError: a refused step changed something, or one that was not refused gives another
            result than torch's.
    """
    module, twin = _module(stored), _module(stored)
    last: dict[Any, nn.Module] = {}
    accepted = 0
    for step in steps:
        before = _state(module)
        given = (last.get(ours), last.get(of_torch))
        ready, ready_twin = (_made(step, old) for old in given)
        before_ready = _state_of(ready)
        try:
            _take(ours, module, step, ready)
        except Exception as error:
            assert _state(module) == before, f"{step} raised {error!r}, and changed the module"
            assert _state_of(ready) == before_ready, f"{step} changed its parametrization"
            continue
        _take(of_torch, twin, step, ready_twin)
        accepted += 1
        if isinstance(step, Register):
            last = {ours: ready, of_torch: ready_twin}  # type: ignore[dict-item]
        _compare(module, twin, step)
    return accepted


def _module(stored: str) -> nn.Module:
    module = nn.Module()
    value = torch.arange(SIZE * SIZE, dtype=torch.float32).reshape(SIZE, SIZE) / 8
    if stored == "buffer":
        module.register_buffer("w", value)
    else:
        module.w = nn.Parameter(value, requires_grad=stored == "parameter")
    return module


def _made(step: Step, last: nn.Module | None) -> nn.Module | None:
    if not isinstance(step, Register):
        return None
    return last if step.again and last is not None else KINDS[step.kind]()


def _take(api: Any, module: nn.Module, step: Step, parametrization: nn.Module | None) -> None:
    match step:
        case Register(unsafe=unsafe):
            api.register_parametrization(module, "w", parametrization, unsafe=unsafe)
        case Remove(leave_parametrized=leave):
            api.remove_parametrizations(module, "w", leave_parametrized=leave)
        case Assign(shaped=shaped):
            value = torch.full((SIZE, SIZE) if shaped else (SIZE + 1,), 0.25)
            if not ours.is_parametrized(module, "w"):
                with torch.no_grad():
                    module.w.copy_(value)  # type: ignore[operator, union-attr]
            else:
                module.w = value
        case Train(mode=mode):
            module.train(mode)


def _compare(module: nn.Module, twin: nn.Module, step: Step) -> None:
    assert list(module.state_dict()) == list(twin.state_dict()), step
    here, there = _value(module), _value(twin)
    if not _begins_with_a_pair(module):
        assert not isinstance(here, TypeError), f"{step} was accepted, and reading raises {here!r}"
    if not isinstance(here, Tensor) or not isinstance(there, Tensor):
        assert type(here) is type(there), f"{step}: {here!r} and {there!r}"
        return
    assert here.dtype == there.dtype, step
    assert here.requires_grad == there.requires_grad, step
    assert torch.equal(here, there), step


def _begins_with_a_pair(module: nn.Module) -> bool:
    """Whether the first parametrization takes two tensors, and there is one original.

    ``unsafe``, this is not refused, as torch does not refuse it.
    """
    if not ours.is_parametrized(module, "w"):
        return False
    return isinstance(module.parametrizations["w"][0], Pair)  # type: ignore[index]


def _value(module: nn.Module) -> Tensor | Exception:
    """The value, or why there is none; what reading it counts is put back."""
    counts = {buffer: buffer.clone() for buffer in module.buffers() if buffer.dim() == 0}
    try:
        return module.w  # type: ignore[return-value]
    except Exception as error:
        return error
    finally:
        for buffer, before in counts.items():
            buffer.copy_(before)


def _state_of(parametrization: nn.Module | None) -> list[Any]:
    return [] if parametrization is None else list(_entries(parametrization))


def _state(module: nn.Module) -> tuple[Any, ...]:
    """All that a caller can tell of a module: what is there, by identity, and what it holds."""
    value = _value(module)
    seen = value.tolist() if isinstance(value, Tensor) else type(value)
    return type(module), seen, sorted(vars(module)), *_entries(module)


def _entries(module: nn.Module) -> Iterator[Any]:
    of_tensors: Sequence[Callable[[], Any]] = (module.named_parameters, module.named_buffers)
    for named in of_tensors:
        for name, tensor in named():
            yield name, id(tensor), type(tensor), tensor.requires_grad, tensor.tolist()
    for name, child in module.named_modules():
        yield name, id(child), type(child), child.training, getattr(child, "unsafe", None)
