"""Recurrent networks in a Python loop: orthogonal, and spectral-normed in both modes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from benchmarks.cases import jax_recurrent
from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES", "Recurrent", "sequence"]


class Recurrent(nn.Module):
    """Reads a sequence of shape ``(steps, batch, width)``; gives the last state."""

    def __init__(self, size: Size, wrap: Callable[[nn.Module], nn.Module] = orthogonal) -> None:
        super().__init__()
        self.read = nn.Linear(size.width, size.width)
        self.cell = wrap(nn.Linear(size.width, size.width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[0])
        for row in self.read(x):
            h = torch.tanh(row + self.cell(h))
        return h


class ByHand(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.cell.weight
        h = torch.zeros_like(x[0])
        for row in self.read(x):
            h = torch.tanh(row + linear(h, weight))
        return h


def sequence(size: Size) -> Inputs:
    return (torch.randn(size.steps, size.batch, size.width),)


CASES = [
    Case(
        name="orthogonal-rnn",
        about="an orthogonal recurrent weight, read at each step of a Python loop",
        written=Recurrent,
        by_hand=ByHand,
        inputs=sequence,
        grows="steps",
        jax=jax_recurrent.loop,
        quick=True,
    ),
    Case(
        name="spectral-rnn",
        about="a spectral-normed recurrent weight in training mode: each evaluation has effects",
        written=lambda size: Recurrent(size, spectral_norm),
        by_hand=lambda size: ByHand(size, spectral_norm),
        inputs=sequence,
        grows="steps",
        effects=True,
        scope="cached",
    ),
    Case(
        name="spectral-rnn-eval",
        about="the same in eval mode, trained: the power iteration stands still",
        written=lambda size: Recurrent(size, spectral_norm).eval(),
        by_hand=lambda size: ByHand(size, spectral_norm).eval(),
        inputs=sequence,
        grows="steps",
    ),
]
