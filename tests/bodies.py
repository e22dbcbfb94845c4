"""A cell that counts its evaluations, read in the bodies of higher-order ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils import parametrize

from tests import helpers

STEPS = 4


class Cell(nn.Module):
    """A linear layer whose weight is evaluated, and counted, at each access."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3, dtype=torch.float64)
        for step in (helpers.MatrixExponential(), helpers.Counting()):
            parametrize.register_parametrization(self.cell, "weight", step)
        self.register_buffer("state", torch.randn(3, dtype=torch.float64))
        self.body = body

    def step(self, h: Tensor) -> Tensor:
        return torch.tanh(self.cell(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def in_a_scan(m: Cell, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = m.step(h + row)
        return h + 0, h * 2

    return scan(step, x[0], x, dim=0)[1]


def in_a_map(m: Cell, x: Tensor) -> Tensor:
    return torch_map(m.step, x)


def in_both_branches(m: Cell, x: Tensor) -> Tensor:
    x = torch.cond(x.sum() > 0, lambda x: m.step(x), lambda x: m.step(x) * 2, (x,))
    return torch.cond(x.sum() > 0, lambda x: m.step(x), lambda x: m.step(x) * 2, (x,))


def in_a_while(m: Cell, x: Tensor) -> Tensor:
    def condition(i: Tensor, h: Tensor) -> Tensor:
        return i < STEPS

    def body(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, m.step(h)

    return while_loop(condition, body, (torch.tensor(0), x))[1]
