"""Programs with ``cached()`` regions, and what a run of one leaves behind, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

import fxparam
import fxparam.parametrize as ours
from tests import helpers


class Assigning(nn.Module):
    """Counts its evaluations in a buffer that it assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return x * self.n


class InPlace(nn.Module):
    """Writes, but to nothing that anyone else sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone().mul_(2)


class Iterating(nn.Module):
    """Begins with a step of an iteration under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.v.mul_(0.9).add_(0.2)
        return x + self.v.clone()


class _Clipping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.1, 0.1)


class _Adding(_Clipping):
    """Its gradient is not 0 where nothing came back."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 1


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Clipping.apply(x)


class PlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Adding.apply(x)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "spectral norm": lambda m: ours.adopt(spectral_norm(m)),
    "random mask": lambda m: ours.register_parametrization(m, "weight", helpers.RandomMask()),
    "assigning": lambda m: ours.register_parametrization(m, "weight", Assigning()),
    "pure": lambda m: ours.register_parametrization(m, "weight", helpers.MatrixExponential()),
    "iterating": lambda m: ours.register_parametrization(m, "weight", Iterating()),
    "clipped": lambda m: ours.register_parametrization(m, "weight", Clipped()),
    "in place": lambda m: ours.register_parametrization(m, "weight", InPlace()),
}


class Model(nn.Module):
    def __init__(self, wrap: str, body: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3, dtype=torch.float64)
        WRAPS[wrap](self.cell)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def loop_in_a_region(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        for _ in range(3):
            x = torch.tanh(m.cell(x))
    return x


def nested_regions(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        with fxparam.cached():
            x = m.cell(x)
        return m.cell(x)


def two_regions(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        x = m.cell(m.cell(x))
    with fxparam.cached():
        return m.cell(m.cell(x))


def before_inside_and_after(m: Model, x: Tensor) -> Tensor:
    x = m.cell(x)
    with fxparam.cached():
        x = m.cell(m.cell(x))
    return m.cell(x)


def value_returned(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        return m.cell(x) @ m.cell.weight


def under_no_grad_first(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        with torch.no_grad():
            y = m.cell(x)
        return m.cell(x) + m.cell(y) + y


def original_written(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        y = m.cell(x).detach()
        with torch.no_grad():
            m.cell.parametrizations.weight.original.mul_(1.5)
        return m.cell(x) + y


def value_of_a_later_read_written(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        y = m.cell(x)
        w = m.cell.weight
        with torch.no_grad():
            w.view(-1)[:3].mul_(1.5)
        return m.cell(y)


def in_autocast_that_changes_nothing(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        y = m.cell(x)
        with torch.autocast("cpu", enabled=False):
            y = m.cell(y)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            return m.cell(y)


def in_the_same_autocast_twice(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached(), torch.autocast("cpu", torch.bfloat16):
        y = m.cell.weight.sum()
        with torch.autocast("cpu", torch.bfloat16):
            return x * y * m.cell.weight.sum()


def after_a_switch_of_modes(m: Model, x: Tensor) -> Tensor:
    # Dynamo drops the switch back and the one that an evaluation may begin with.
    with fxparam.cached():
        with torch.no_grad():
            y = x * 2
        x = m.cell(x)
        with torch.no_grad():
            y = y * 2
        x = m.cell(x)
        with torch.no_grad():
            y = y * m.cell.bias
        return m.cell(x) + y


def in_a_switch_of_another_kind(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        x = m.cell(x)
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return m.cell(x)


def read_for_the_shape(m: Model, x: Tensor) -> Tensor:
    # Dynamo drops what is computed for the shape alone, where it has no effects.
    with fxparam.cached():
        x = m.cell(x)[:, : m.cell.weight.shape[0]]
        return m.cell(m.cell(x))


def first_read_for_the_shape(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        return m.cell(m.cell(x[:, : m.cell.weight.shape[0]]))


def decorated(m: Model, x: Tensor) -> Tensor:
    @fxparam.cached()
    def run(x: Tensor) -> Tensor:
        return m.cell(m.cell(x))

    return run(x)


# How many evaluations are left in the graph.
BODIES: dict[Callable[..., Any], int] = {
    loop_in_a_region: 1,
    nested_regions: 1,
    two_regions: 2,
    before_inside_and_after: 3,
    value_returned: 1,
    under_no_grad_first: 2,
    original_written: 2,
    value_of_a_later_read_written: 2,
    in_autocast_that_changes_nothing: 1,
    after_a_switch_of_modes: 1,
    in_a_switch_of_another_kind: 1,
    read_for_the_shape: 1,
    first_read_for_the_shape: 1,
    in_the_same_autocast_twice: 1,
    decorated: 1,
}


def steps(model: nn.Module, run: Callable[..., Any], x: Tensor) -> Iterator[list[Any]]:
    for seed in range(2):
        model.zero_grad()
        torch.manual_seed(seed)
        out = run(x)
        out.sum().backward()
        yield [
            out.detach(),
            *(p.grad for p in model.parameters()),
            *(b.clone() for b in model.buffers()),
            torch.get_rng_state(),
        ]


def check(compiled: Any, twin: nn.Module, model: nn.Module, x: Tensor) -> None:
    """A compiled model does what its twin does in eager code, step by step."""
    for actual, expected in zip(steps(twin, compiled, x), steps(model, model, x), strict=True):
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Scheduled(nn.Module):
    """Counts its evaluations in a Python attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.n


class Initialized(nn.Module):
    """Finds its scale when it is evaluated first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.known = False
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.inner.known:
            self.scale.copy_(x.detach().abs().mean(0))
            self.inner.known = True
            return x
        return x * self.scale
