"""One function called many times: a deep equilibrium, and an ODE in a fixed-step solver."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]

_CALLS = 4  # of the function, in one Runge-Kutta step


class Contraction(nn.Module):
    """Rows scaled to a sum of magnitudes below one, which makes ``tanh(W z + c)`` contract."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.abs().sum(1, keepdim=True)
        return weight * (0.9 / rows.clamp(min=0.9))


class Antisymmetric(nn.Module):
    """``A - A^T``, slightly damped: the stable dynamics of antisymmetric networks."""

    eye: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("eye", torch.eye(size))

    def forward(self, weight: Tensor) -> Tensor:
        upper = torch.triu(weight, 1)
        return upper - upper.mT - 0.05 * self.eye


class Equilibrium(nn.Module):
    """Iterates ``z = tanh(W z + U x)`` towards its fixed point."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.steps = size.steps
        self.inject = nn.Linear(size.width, size.width)
        self.inner = nn.Linear(size.width, size.width, bias=False)
        register_parametrization(self.inner, "weight", Contraction())

    def forward(self, x: Tensor) -> Tensor:
        c = self.inject(x)
        z = torch.zeros_like(c)
        for _ in range(self.steps):
            z = torch.tanh(self.inner(z) + c)
        return z


class EquilibriumByHand(Equilibrium):
    def forward(self, x: Tensor) -> Tensor:
        weight, c = self.inner.weight, self.inject(x)
        z = torch.zeros_like(c)
        for _ in range(self.steps):
            z = torch.tanh(linear(z, weight) + c)
        return z


class ODE(nn.Module):
    """The classical Runge-Kutta method from 0 to 1; ``steps`` counts calls of the function."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.intervals = max(1, size.steps // _CALLS)
        self.field = nn.Linear(size.width, size.width)
        register_parametrization(self.field, "weight", Antisymmetric(size.width))

    def velocity(self, z: Tensor) -> Tensor:
        return torch.tanh(self.field(z))

    def forward(self, z: Tensor) -> Tensor:
        h = 1 / self.intervals
        for _ in range(self.intervals):
            a = self.velocity(z)
            b = self.velocity(z + h / 2 * a)
            c = self.velocity(z + h / 2 * b)
            d = self.velocity(z + h * c)
            z = z + h / 6 * (a + 2 * b + 2 * c + d)
        return z


class ODEByHand(ODE):
    def forward(self, z: Tensor) -> Tensor:
        weight, bias = self.field.weight, self.field.bias
        h = 1 / self.intervals
        for _ in range(self.intervals):
            a = torch.tanh(linear(z, weight, bias))
            b = torch.tanh(linear(z + h / 2 * a, weight, bias))
            c = torch.tanh(linear(z + h / 2 * b, weight, bias))
            d = torch.tanh(linear(z + h * c, weight, bias))
            z = z + h / 6 * (a + 2 * b + 2 * c + d)
        return z


def _points(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width),)


CASES = [
    Case(
        name="equilibrium",
        about="a deep-equilibrium iteration with a contractive weight, differentiated through",
        written=Equilibrium,
        by_hand=EquilibriumByHand,
        inputs=_points,
        grows="steps",
    ),
    Case(
        name="ode",
        about="an ODE function with an antisymmetric weight, called by a fixed-step solver",
        written=ODE,
        by_hand=ODEByHand,
        inputs=_points,
        grows="steps",
        quick=True,
    ),
]
