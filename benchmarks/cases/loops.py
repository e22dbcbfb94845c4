"""The orthogonal recurrent network in loops that keep their bodies: ``scan`` and checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import jax_recurrent
from benchmarks.cases.case import Case
from benchmarks.cases.recurrent import Recurrent, sequence

__all__ = ["CASES"]

_SEGMENT = 4  # steps between two checkpoints


class Scan(Recurrent):
    """Gives the states of all steps."""

    def forward(self, x: Tensor) -> Tensor:
        def body(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(row + self.cell(h)).to(h.dtype)  # a carry's, under autocast too
            return h + 0, h * 1.0  # Inductor refuses a carry that aliases an output

        return scan(body, torch.zeros_like(x[0]), self.read(x), dim=0)[1]


class ScanByHand(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.cell.weight

        def body(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(row + linear(h, weight)).to(h.dtype)
            return h + 0, h * 1.0

        return scan(body, torch.zeros_like(x[0]), self.read(x), dim=0)[1]


class Checkpointed(Recurrent):
    def segment(self, h: Tensor, rows: Tensor) -> Tensor:
        for row in rows:
            h = torch.tanh(row + self.cell(h))
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[0])
        for rows in self.read(x).split(_SEGMENT):
            h = checkpoint(self.segment, h, rows, use_reentrant=False)
        return h


class CheckpointedByHand(Recurrent):
    def segment(self, h: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        for row in rows:
            h = torch.tanh(row + linear(h, weight))
        return h

    def forward(self, x: Tensor) -> Tensor:
        weight = self.cell.weight
        h = torch.zeros_like(x[0])
        for rows in self.read(x).split(_SEGMENT):
            h = checkpoint(self.segment, h, rows, weight, use_reentrant=False)
        return h


CASES = [
    Case(
        name="orthogonal-rnn-scan",
        about="the recurrence as a scan, whose body is compiled once and reads the weight",
        written=Scan,
        by_hand=ScanByHand,
        inputs=sequence,
        grows="steps",
        jax=jax_recurrent.scan,
        quick=True,
    ),
    Case(
        name="orthogonal-rnn-checkpoint",
        about=f"the recurrence in checkpointed segments of {_SEGMENT} steps",
        written=Checkpointed,
        by_hand=CheckpointedByHand,
        inputs=sequence,
        grows="steps",
    ),
]
