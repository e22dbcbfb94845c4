"""A Lipschitz network of many orthonormalized weights of one shape, each read once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]


class Bjorck(nn.Module):
    """Björck's iteration towards the nearest orthogonal matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        # Safe bound on the largest singular value, within which the iteration converges.
        w = weight / (weight.abs().sum(0).max() * weight.abs().sum(1).max()).sqrt()
        for _ in range(5):
            w = 1.5 * w - 0.5 * w @ (w.mT @ w)
        return w


class LipschitzMLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            register_parametrization(nn.Linear(size.width, size.width), "weight", Bjorck())
            for _ in range(size.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            a, b = layer(x).chunk(2, -1)
            x = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)  # keeps gradients' norms
        return x


def _points(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width),)


_LIPSCHITZ = Case(
    name="lipschitz-mlp",
    about="a control: many weights of one shape, read once as they are",
    written=LipschitzMLP,
    by_hand=LipschitzMLP,
    inputs=_points,
    grows="layers",
    size=Size(layers=16, width=32, batch=64),
)

CASES = [
    _LIPSCHITZ,
    replace(
        _LIPSCHITZ,
        name="lipschitz-mlp-many",
        about="the same with 64 weights",
        size=Size(layers=64, width=32, batch=64),
    ),
]
