"""Gradient accumulation: micro-batches through the orthogonal recurrent network, then one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.cases.case import Case, Inputs, Run, Size, loss_of
from benchmarks.cases.recurrent import Recurrent

__all__ = ["CASES"]

_MICRO_BATCHES = 4


class GivenWeight(Recurrent):
    """Gives the weight, or takes it as an argument: both are compiled, under the same modes."""

    def forward(self, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        if x is None or weight is None:
            return self.cell.weight
        h = torch.zeros_like(x[0])
        for row in self.read(x):
            h = torch.tanh(row + linear(h, weight))
        return h


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
    weight = run()
    leaf = weight.detach().requires_grad_(weight.requires_grad)
    outputs = []
    for x in inputs:
        y = run(x, leaf)
        loss_of(y).backward()
        outputs.append(y.detach())
    if weight.grad_fn is not None:
        weight.backward(leaf.grad)
    return outputs


def _micro_batches(size: Size) -> Inputs:
    shape = (size.steps, size.batch // 2, size.width)
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
]
