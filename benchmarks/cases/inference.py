"""The orthogonal recurrent network in inference, with weights that never change; and exported.

And ``nn.RNNCell`` exported with its hidden weight under a norm, as people report it from practice
(https://github.com/pytorch/pytorch/issues/167645).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from benchmarks.cases.accumulation import TernaryStack
from benchmarks.cases.case import Case, Size
from benchmarks.cases.recurrent import ByHand, Recurrent, sequence
from benchmarks.cases.wavenet import Stack, window

__all__ = ["CASES"]

_STEPS = Size(steps=64)


class Cells(nn.Module):
    """``nn.RNNCell`` along a sequence; its parametrized weight is read in each call of it."""

    def __init__(self, wrap: Callable[..., nn.Module], size: Size) -> None:
        super().__init__()
        self.cell = wrap(nn.RNNCell(size.width, size.width), name="weight_hh")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[0])
        for row in x.unbind():
            h = self.cell(row, h)
        return h


class CellsByHand(Cells):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.cell.weight_hh
        h = torch.zeros_like(x[0])
        for row in x.unbind():
            h = torch.rnn_tanh_cell(
                row, h, self.cell.weight_ih, weight, self.cell.bias_ih, self.cell.bias_hh
            )
        return h


def _exported_cells(name: str, wrap: Callable[..., nn.Module]) -> Case:
    return Case(
        name=f"export-{name}-cell",
        about=f"nn.RNNCell under {wrap.__name__}, 64 steps, exported and compiled by AOTInductor",
        written=lambda size: Cells(wrap, size).eval(),
        by_hand=lambda size: CellsByHand(wrap, size).eval(),
        inputs=sequence,
        grows="steps",
        size=_STEPS,
        train=False,
        exported=True,
        scope="fold",
    )


CASES = [
    _exported_cells("orthogonal", orthogonal),
    _exported_cells("spectral", spectral_norm),
    Case(
        name="inference",
        about="the recurrence without gradients; between calls the weight never changes",
        written=lambda size: Recurrent(size).eval(),
        by_hand=lambda size: ByHand(size).eval(),
        inputs=sequence,
        grows="steps",
        train=False,
        scope="frozen",
    ),
    Case(
        name="inference-weight-norm",
        about="a stack of gated convolutions under weight norm, without gradients",
        written=lambda size: Stack(size).eval(),
        by_hand=lambda size: Stack(size).eval(),
        inputs=window,
        grows="layers",
        size=Size(layers=16, width=32, batch=8),
        train=False,
        scope="frozen",
    ),
    Case(
        name="inference-ternary",
        about="linear layers with ternary weights, without gradients",
        written=lambda size: TernaryStack(size).eval(),
        by_hand=lambda size: TernaryStack(size).eval(),
        inputs=lambda size: (torch.randn(size.batch, 4 * size.width),),
        grows="layers",
        train=False,
        scope="frozen",
    ),
    Case(
        name="export",
        about="the recurrence exported and compiled by AOTInductor",
        written=lambda size: Recurrent(size).eval(),
        by_hand=lambda size: ByHand(size).eval(),
        inputs=sequence,
        grows="steps",
        train=False,
        exported=True,
        scope="fold",
    ),
]
