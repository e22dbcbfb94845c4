"""A recurrent network with a parametrized weight, as it is trained, served and exported.

Exported is ``nn.RNNCell``, as people report it from practice
(https://github.com/pytorch/pytorch/issues/167645).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.utils.checkpoint import checkpoint

from benchmarks.cases.case import Case, Inputs, Run, Size, loss_of, reader

__all__ = ["CASES", "accumulate", "accumulate_by_hand"]

_MICRO_BATCHES = 8
_SEGMENT = 4  # steps between two checkpoints
_Weight = Callable[[], Tensor]


class Recurrent(nn.Module):
    """Reads a sequence of shape ``(steps, batch, width)``; gives the last state."""

    def __init__(
        self, size: Size, by_hand: bool, wrap: Callable[[nn.Module], nn.Module] = orthogonal
    ) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.read = nn.Linear(size.width, size.width)
        self.cell = wrap(nn.Linear(size.width, size.width, bias=False))

    def run(self, h: Tensor, rows: Tensor, weight: _Weight) -> Tensor:
        for row in rows:
            h = torch.tanh(row + linear(h, weight()))
        return h

    def forward(self, x: Tensor) -> Tensor:
        weight = reader(self.cell, self.by_hand)
        return self.run(torch.zeros_like(x[0]), self.read(x), weight)


class Scan(Recurrent):
    """Gives the states of all steps."""

    def forward(self, x: Tensor) -> Tensor:
        weight = reader(self.cell, self.by_hand)

        def body(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(row + linear(h, weight())).to(h.dtype)  # a carry's, under autocast too
            return h + 0, h * 1.0  # Inductor refuses a carry that aliases an output

        return scan(body, torch.zeros_like(x[0]), self.read(x), dim=0)[1]


class Checkpointed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        weight, h = reader(self.cell, self.by_hand), torch.zeros_like(x[0])
        for rows in self.read(x).split(_SEGMENT):
            h = checkpoint(self.run, h, rows, weight, use_reentrant=False)
        return h


class Broken(Recurrent):
    """Four graphs. The breaks are outside of loops: Dynamo compiles no frame that breaks in one."""

    def forward(self, x: Tensor) -> Tensor:
        weight = reader(self.cell, self.by_hand)
        first, second, third, fourth = self.read(x).chunk(4)
        h = self.run(torch.zeros_like(x[0]), first, weight)
        torch._dynamo.graph_break()
        h = self.run(h, second, weight)
        torch._dynamo.graph_break()
        h = self.run(h, third, weight)
        torch._dynamo.graph_break()
        return self.run(h, fourth, weight)


class Given(Recurrent):
    """By hand, it gives the weight, or takes it: both are compiled, under the same modes."""

    def forward(self, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        if x is None:
            return self.cell.weight
        read: _Weight = reader(self.cell, False) if weight is None else lambda: weight
        return self.run(torch.zeros_like(x[0]), self.read(x), read)


class Cell(Recurrent):
    """One step, called in an eager loop. By hand, it gives the weight, or takes it."""

    def forward(self, row: Any = None, h: Any = None, weight: Tensor | None = None) -> Tensor:
        if row is None:
            return self.cell.weight
        return torch.tanh(
            self.read(row) + linear(h, self.cell.weight if weight is None else weight)
        )


class Exported(nn.Module):
    """``nn.RNNCell`` along a sequence, with an orthogonal weight."""

    def __init__(self, size: Size, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.cell = orthogonal(nn.RNNCell(size.width, size.width), name="weight_hh")

    def forward(self, x: Tensor) -> Tensor:
        cell, weight = self.cell, reader(self.cell, self.by_hand, "weight_hh")
        h = torch.zeros_like(x[0])
        for row in x.unbind():
            h = torch.rnn_tanh_cell(row, h, cell.weight_ih, weight(), cell.bias_ih, cell.bias_hh)
        return h


def _sequence(size: Size) -> Inputs:
    return (torch.randn(size.steps, size.batch, size.width),)


def _rows(size: Size) -> Inputs:
    return tuple(torch.randn(size.batch, size.width) for _ in range(size.steps + 1))


def _sequences(size: Size) -> Inputs:
    shape = (size.steps, size.batch // 2, size.width)
    return tuple(torch.randn(shape) for _ in range(_MICRO_BATCHES))


def _loop(run: Run, inputs: Inputs) -> Any:
    h, *rows = inputs
    for row in rows:
        h = run(row, h)
    loss_of(h).backward()
    return h


def _loop_by_hand(run: Run, inputs: Inputs) -> Any:
    weight = run()
    return _loop(lambda row, h: run(row, h, weight), inputs)


def accumulate(run: Run, inputs: Inputs) -> Any:
    """One step of micro-batches, a backward each."""
    outputs = []
    for x in inputs:
        y = run(x)
        loss_of(y).backward()
        outputs.append(y.detach())
    return outputs


def accumulate_by_hand(run: Run, inputs: Inputs) -> Any:
    """One evaluation before the micro-batches, and one backward through it after them."""
    given = run()
    weights = given if isinstance(given, tuple) else (given,)
    leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
    outputs = accumulate(lambda x: run(x, *leaves), inputs)
    if weights[0].grad_fn is not None:
        torch.autograd.backward(weights, [leaf.grad for leaf in leaves])
    return outputs


_case = partial(Case, inputs=_sequence, grows="steps")
CASES = [
    _case(
        name="orthogonal-rnn",
        about="an orthogonal recurrent weight, read at each step of a Python loop",
        model=Recurrent,
        also=("fxparam-no-lower", "fxparam-adopted", "fxparam-region", "fxparam-call"),
        quick=True,
    ),
    _case(
        name="orthogonal-rnn-scan",
        about="the recurrence as a scan, whose body is compiled once and reads the weight",
        model=Scan,
        also=("fxparam-no-lower",),
        quick=True,
    ),
    _case(
        name="orthogonal-rnn-checkpoint",
        about=f"the recurrence in checkpointed segments of {_SEGMENT} steps",
        model=Checkpointed,
        also=("fxparam-no-lower",),
    ),
    _case(
        name="spectral-rnn",
        about="a spectral-normed recurrent weight in training mode: each evaluation has effects",
        model=lambda size, by_hand: Recurrent(size, by_hand, spectral_norm),
        effects=True,
        also=("fxparam-region", "fxparam-call"),
    ),
    _case(
        name="graph-breaks",
        about="the recurrence in four graphs of one call",
        model=Broken,
        fullgraph=False,
        also=("fxparam-call", "fxparam-around"),
    ),
    _case(
        name="eager-loop",
        about="a compiled cell that eager code calls in a loop",
        model=Cell,
        inputs=_rows,
        called_in_a_loop=True,
        also=("fxparam-around",),
        step=_loop,
        by_hand_step=_loop_by_hand,
    ),
    _case(
        name="accumulation",
        about=f"{_MICRO_BATCHES} micro-batches, a backward each, through the recurrence",
        model=Given,
        inputs=_sequences,
        also=("fxparam-step",),
        step=accumulate,
        by_hand_step=accumulate_by_hand,
    ),
    _case(
        name="inference",
        about="the recurrence without gradients; between calls the weight never changes",
        model=lambda size, by_hand: Recurrent(size, by_hand).eval(),
        also=("inductor-freezing", "fxparam-frozen"),
        train=False,
    ),
    _case(
        name="export",
        about="nn.RNNCell with an orthogonal weight, 64 steps, compiled by AOTInductor",
        model=lambda size, by_hand: Exported(size, by_hand).eval(),
        size=Size(steps=64),
        also=("inductor-freezing", "fxparam-fold"),
        train=False,
        exported=True,
    ),
]
