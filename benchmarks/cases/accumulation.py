"""Gradient accumulation: micro-batches, a backward each, then one step.

Through the orthogonal recurrent network; and through linear layers with ternary weights, whose
gradient goes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Run, Size, loss_of
from benchmarks.cases.recurrent import Recurrent

__all__ = ["CASES", "TernaryStack"]

_MICRO_BATCHES = 8


class GivenWeight(Recurrent):
    """Gives the weight, or takes it as an argument: both are compiled, under the same modes."""

    def forward(self, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        if x is None or weight is None:
            return self.cell.weight
        h = torch.zeros_like(x[0])
        for row in self.read(x):
            h = torch.tanh(row + linear(h, weight))
        return h


class Ternary(nn.Module):
    """Minus one, zero or one times a scale for each row; the gradient of the identity."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.abs().mean(1, keepdim=True) + 1e-6
        rounded = (weight / scale).round().clamp(-1, 1) * scale
        return weight + (rounded - weight).detach()


class TernaryStack(nn.Module):
    """Linear layers without biases, as large language models have them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = 4 * size.width
        self.layers = nn.ModuleList(
            register_parametrization(nn.Linear(width, width, bias=False), "weight", Ternary())
            for _ in range(size.layers // 4 or 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


class TernaryStackGivenWeights(TernaryStack):
    """Gives the weights, or takes them."""

    def forward(self, x: Tensor | None = None, *weights: Tensor) -> Any:
        if x is None:
            return tuple(layer.weight for layer in self.layers)
        for weight in weights:
            x = x + nn.functional.silu(linear(x, weight))
        return x


def _accumulate(
    model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]
) -> Any:
    outputs = []
    for x in inputs:
        y = run(x)
        loss_of(y).backward()
        outputs.append(y.detach())
    return outputs


def _accumulate_by_hand(
    model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]
) -> Any:
    """One evaluation before the micro-batches, and one backward through it after them."""
    given = run()
    weights = given if isinstance(given, tuple) else (given,)
    leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
    outputs = []
    for x in inputs:
        y = run(x, *leaves)
        loss_of(y).backward()
        outputs.append(y.detach())
    if weights[0].grad_fn is not None:
        torch.autograd.backward(weights, [leaf.grad for leaf in leaves])
    return outputs


def _micro_batches(size: Size) -> Inputs:
    shape = (size.steps, size.batch // 2, size.width)
    return tuple(torch.randn(shape) for _ in range(_MICRO_BATCHES))


def _tokens(size: Size) -> Inputs:
    shape = (size.batch, 4 * size.width)
    return tuple(torch.randn(shape) for _ in range(_MICRO_BATCHES))


CASES = [
    Case(
        name="accumulation",
        about=f"{_MICRO_BATCHES} micro-batches, a backward each, through the recurrence",
        written=Recurrent,
        by_hand=GivenWeight,
        inputs=_micro_batches,
        grows="steps",
        step=_accumulate,
        by_hand_step=_accumulate_by_hand,
        scope="accumulate",
    ),
    Case(
        name="ternary-accumulation",
        about=f"{_MICRO_BATCHES} micro-batches through linear layers with ternary weights",
        written=TernaryStack,
        by_hand=TernaryStackGivenWeights,
        inputs=_tokens,
        grows="layers",
        step=_accumulate,
        by_hand_step=_accumulate_by_hand,
        scope="accumulate",
    ),
]
