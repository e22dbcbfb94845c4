"""The orthogonal recurrent network with graph breaks: four graphs, each reads the weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cases.case import Case
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


CASES = [
    Case(
        name="graph-breaks",
        about="the recurrence in four graphs of one call",
        written=Broken,
        by_hand=BrokenByHand,
        inputs=sequence,
        grows="steps",
        fullgraph=False,
        scope="cached",
    ),
]
