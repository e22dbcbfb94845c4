"""The orthogonal recurrent network in several graphs, each of which reads the weight.

Four graphs of one call, split by graph breaks; and a compiled cell in an eager loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.cases.case import Case, Inputs, Run, Size, loss_of
from benchmarks.cases.recurrent import Recurrent, sequence

__all__ = ["CASES"]


class Broken(Recurrent):
    """The breaks stand outside of loops: Dynamo does not compile a frame that breaks in one."""

    def run(self, h: Tensor, rows: Tensor) -> Tensor:
        for row in rows:
            h = torch.tanh(row + self.cell(h))
        return h

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.read(x).chunk(4)
        h = self.run(torch.zeros_like(x[0]), first)
        torch._dynamo.graph_break()
        h = self.run(h, second)
        torch._dynamo.graph_break()
        h = self.run(h, third)
        torch._dynamo.graph_break()
        return self.run(h, fourth)


class BrokenByHand(Recurrent):
    def run(self, h: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        for row in rows:
            h = torch.tanh(row + linear(h, weight))
        return h

    def forward(self, x: Tensor) -> Tensor:
        weight = self.cell.weight
        first, second, third, fourth = self.read(x).chunk(4)
        h = self.run(torch.zeros_like(x[0]), first, weight)
        torch._dynamo.graph_break()
        h = self.run(h, second, weight)
        torch._dynamo.graph_break()
        h = self.run(h, third, weight)
        torch._dynamo.graph_break()
        return self.run(h, fourth, weight)


class Cell(Recurrent):
    """One step: compiled, and called in a loop that is not."""

    def forward(self, row: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.read(row) + self.cell(h))


class CellByHand(Recurrent):
    """Gives the weight, or takes it."""

    def forward(
        self, row: Tensor | None = None, h: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if row is None or h is None or weight is None:
            return self.cell.weight
        return torch.tanh(self.read(row) + linear(h, weight))


def _loop(model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]) -> Any:
    h, *rows = inputs
    for row in rows:
        h = run(row, h)
    forward_done()
    loss_of(h).backward()
    return h


def _loop_by_hand(
    model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]
) -> Any:
    h, *rows = inputs
    weight = run()
    for row in rows:
        h = run(row, h, weight)
    forward_done()
    loss_of(h).backward()
    return h


def _rows(size: Size) -> Inputs:
    return tuple(torch.randn(size.batch, size.width) for _ in range(size.steps + 1))


CASES = [
    Case(
        name="graph-breaks",
        about="the recurrence in four graphs of one call",
        written=Broken,
        by_hand=BrokenByHand,
        inputs=sequence,
        grows="steps",
        fullgraph=False,
        scope="call",
    ),
    Case(
        name="eager-loop",
        about="a compiled cell that eager code calls in a loop",
        written=Cell,
        by_hand=CellByHand,
        inputs=_rows,
        grows="steps",
        scope="around",
        step=_loop,
        by_hand_step=_loop_by_hand,
    ),
]
