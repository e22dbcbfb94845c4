"""Layers that use a weight twice, an ODE's function that is called often, and 64 equal layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Size, reader

__all__ = ["CASES"]

_CALLS = 4  # of the function, in one Runge-Kutta step


class Antisymmetric(nn.Module):
    """``A - A^T``, slightly damped: the stable dynamics of antisymmetric networks."""

    eye: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("eye", torch.eye(size))

    def forward(self, weight: Tensor) -> Tensor:
        upper = torch.triu(weight, 1)
        return upper - upper.mT - 0.05 * self.eye


class ODE(nn.Module):
    """The classical Runge-Kutta method from 0 to 1; ``steps`` counts calls of the function."""

    def __init__(self, size: Size, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.intervals = by_hand, max(1, size.steps // _CALLS)
        self.field = nn.Linear(size.width, size.width)
        register_parametrization(self.field, "weight", Antisymmetric(size.width))

    def forward(self, z: Tensor) -> Tensor:
        weight, h = reader(self.field, self.by_hand), 1 / self.intervals

        def velocity(z: Tensor) -> Tensor:
            return torch.tanh(linear(z, weight(), self.field.bias))

        for _ in range(self.intervals):
            a = velocity(z)
            b = velocity(z + h / 2 * a)
            c = velocity(z + h / 2 * b)
            d = velocity(z + h * c)
            z = z + h / 6 * (a + 2 * b + 2 * c + d)
        return z


class Sylvester(nn.Module):
    """A step of a normalizing flow: a triangular update in an orthogonal basis, and back."""

    def __init__(self, width: int, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.basis = orthogonal(nn.Linear(width, width, bias=False))
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (z, total), basis = given, reader(self.basis, self.by_hand)
        inner, outer = torch.triu(self.inner.weight), torch.triu(self.outer.weight)
        hidden = torch.tanh(linear(linear(z, basis()), inner, self.inner.bias))
        slope = (1 - hidden.square()) * torch.diagonal(inner) * torch.diagonal(outer)
        log_determinant = torch.log((1 + slope).abs() + 1e-6).sum(-1)
        return z + linear(hidden, outer) @ basis(), total + log_determinant


class Flow(nn.Module):
    def __init__(self, size: Size, by_hand: bool) -> None:
        super().__init__()
        self.steps = nn.Sequential(*(Sylvester(size.width, by_hand) for _ in range(size.layers)))

    def forward(self, x: Tensor) -> Any:
        return self.steps((x, torch.zeros_like(x[:, 0])))


class Bottleneck(nn.Module):
    """A residual step into fewer features and back by the transpose: no norm grows."""

    def __init__(self, width: int, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.narrow = orthogonal(nn.Linear(width, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = reader(self.narrow, self.by_hand)
        return x - torch.tanh(linear(x, weight(), self.narrow.bias)) @ weight()


class Bjorck(nn.Module):
    """Björck's iteration towards the nearest orthogonal matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        # Safe bound on the largest singular value, within which the iteration converges.
        w = weight / (weight.abs().sum(0).max() * weight.abs().sum(1).max()).sqrt()
        for _ in range(5):
            w = 1.5 * w - 0.5 * w @ (w.mT @ w)
        return w


class Lipschitz(nn.Module):
    """A layer of a 1-Lipschitz network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        register_parametrization(self.layer, "weight", Bjorck())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x).chunk(2, -1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)  # keeps gradients' norms


def _points(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width),)


_case = partial(Case, inputs=_points, grows="layers")
CASES = [
    _case(
        name="ode",
        about="an ODE function with an antisymmetric weight, called by a fixed-step solver",
        model=ODE,
        grows="steps",
        quick=True,
    ),
    _case(
        name="orthogonal-flow",
        about="a Sylvester flow: 16 orthogonal matrices of 32, each read twice",
        model=Flow,
        size=Size(layers=16, width=32, batch=64),
        also=("fxparam-no-lower", "fxparam-no-batch"),
    ),
    _case(
        name="orthogonal-flow-wide",
        about="a Sylvester flow: 16 orthogonal matrices of 128, each read twice",
        model=Flow,
        size=Size(layers=16, width=128, batch=64),
        also=("fxparam-no-batch",),
    ),
    _case(
        name="orthogonal-stack",
        about="4 orthogonal weights of 128x256, by Householder reflectors, each read twice",
        model=lambda size, by_hand: nn.Sequential(
            *(Bottleneck(size.width, by_hand) for _ in range(size.layers))
        ),
        size=Size(layers=4, width=256, batch=64),
        also=("fxparam-no-batch",),
        eager_by_hand=True,
    ),
    _case(
        name="equal-layers",
        about="64 equal layers, each of whose weights is orthonormalized and read once",
        model=lambda size, by_hand: nn.Sequential(
            *(Lipschitz(size.width) for _ in range(size.layers))
        ),
        size=Size(layers=64, width=32, batch=64),
        also=("fxparam-no-batch",),
        reads_once=True,
    ),
]
