"""Normalizing flows, which read a weight twice: for its determinant, or for the way back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Size, precise

__all__ = ["CASES"]

_SCALE = 0.1  # of a coupling: with 1 the gradients of 64 steps are beyond any precision


class Triangular(nn.Module):
    """Glow's invertible matrix from one original: a unit lower times an upper triangle."""

    eye: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("eye", torch.eye(size))

    def forward(self, x: Tensor) -> Tensor:
        lower = torch.tril(x, -1) + self.eye
        upper = torch.triu(x, 1) + torch.diag(torch.exp(torch.diagonal(x)))
        return lower @ upper


class GlowStep(nn.Module):
    """An invertible mix of the channels and an affine coupling, whose net is weight-normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.mix.weight, std=width**-1)
        register_parametrization(self.mix, "weight", Triangular(width))
        self.enter = weight_norm(nn.Linear(width // 2, width))
        self.leave = weight_norm(nn.Linear(width, width))

    def couple(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, -1)
        scale, shift = self.leave(torch.tanh(self.enter(kept))).chunk(2, -1)
        scale = _SCALE * torch.tanh(scale)
        return torch.cat([kept, moved * torch.exp(scale) + shift], -1), scale.sum(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, scales = self.couple(self.mix(x))
        return x, scales + torch.linalg.slogdet(precise(self.mix.weight)).logabsdet


class GlowStepByHand(GlowStep):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.mix.weight
        x, scales = self.couple(linear(x, weight))
        return x, scales + torch.linalg.slogdet(precise(weight)).logabsdet


class SylvesterStep(nn.Module):
    """A Sylvester flow: into an orthogonal basis, a triangular update there, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.basis = orthogonal(nn.Linear(width, width, bias=False))
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width, bias=False)

    def update(self, z: Tensor) -> tuple[Tensor, Tensor]:
        inner, outer = torch.triu(self.inner.weight), torch.triu(self.outer.weight)
        hidden = torch.tanh(linear(z, inner, self.inner.bias))
        slope = (1 - hidden.square()) * torch.diagonal(inner) * torch.diagonal(outer)
        return linear(hidden, outer), torch.log((1 + slope).abs() + 1e-6).sum(-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        change, log_determinant = self.update(self.basis(z))
        return z + change @ self.basis.weight, log_determinant


class SylvesterStepByHand(SylvesterStep):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        basis = self.basis.weight
        change, log_determinant = self.update(linear(z, basis))
        return z + change @ basis, log_determinant


class Flow(nn.Module):
    def __init__(self, size: Size, kind: type[GlowStep] | type[SylvesterStep]) -> None:
        super().__init__()
        self.flows = nn.ModuleList(kind(size.width) for _ in range(size.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x[:, 0])
        for flow in self.flows:
            x, log_determinant = flow(x)
            total = total + log_determinant
        return x, total


def _points(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width),)


_SYLVESTER = Case(
    name="orthogonal-flow",
    about="a Sylvester flow: many orthogonal matrices of one shape, each read twice",
    written=lambda size: Flow(size, SylvesterStep),
    by_hand=lambda size: Flow(size, SylvesterStepByHand),
    inputs=_points,
    grows="layers",
    size=Size(layers=16, width=32, batch=64),
)

CASES = [
    Case(
        name="waveglow",
        about="a WaveGlow-like flow: each mixing matrix transforms, and its determinant is taken",
        written=lambda size: Flow(size, GlowStep),
        by_hand=lambda size: Flow(size, GlowStepByHand),
        inputs=_points,
        grows="layers",
        size=Size(layers=16, width=64, batch=64),
    ),
    _SYLVESTER,
    replace(
        _SYLVESTER,
        name="orthogonal-flow-wide",
        about="the same with matrices of 128",
        size=Size(layers=16, width=128, batch=64),
    ),
    replace(
        _SYLVESTER,
        name="orthogonal-flow-many",
        about="the same with 64 matrices",
        size=Size(layers=64, width=32, batch=64),
    ),
]
