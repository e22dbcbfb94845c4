"""The orthogonal recurrent network in inference, with weights that never change; and exported."""

from __future__ import annotations

from benchmarks.cases.case import Case
from benchmarks.cases.recurrent import ByHand, Recurrent, sequence

__all__ = ["CASES"]

CASES = [
    Case(
        name="inference",
        about="the recurrence without gradients; between calls the weight never changes",
        written=lambda size: Recurrent(size).eval(),
        by_hand=lambda size: ByHand(size).eval(),
        inputs=sequence,
        grows="steps",
        train=False,
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
