"""Stacks of layers with rectangular orthogonal weights, which narrow and widen again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]


class Bottleneck(nn.Module):
    """A residual step into fewer features and back by the transpose: no norm grows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = orthogonal(nn.Linear(width, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.tanh(self.narrow(x)) @ self.narrow.weight


class BottleneckByHand(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.narrow.weight
        return x - torch.tanh(linear(x, weight, self.narrow.bias)) @ weight


def _stack(size: Size, kind: type[Bottleneck]) -> nn.Module:
    return nn.Sequential(*(kind(size.width) for _ in range(size.layers)))


def _points(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width),)


CASES = [
    Case(
        name="orthogonal-stack",
        about="many rectangular orthogonal weights, Householder reflectors, each read twice",
        written=lambda size: _stack(size, Bottleneck),
        by_hand=lambda size: _stack(size, BottleneckByHand),
        inputs=_points,
        grows="layers",
        size=Size(layers=16, width=256, batch=64),
    ),
]
