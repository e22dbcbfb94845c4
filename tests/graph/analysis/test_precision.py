"""Which values have less precision than the originals they are computed from."""

from __future__ import annotations

import operator

import torch

from fxparam.graph.analysis.precision import narrowed
from tests.graph.sketch import Sketch


def test_what_is_cast_down_and_what_is_computed_from_it() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    half = s.call("to", p, torch.float16)
    row = s.call(operator.getitem, half, 0)
    back = s.call("to", row, torch.float64)  # its sum passes the small range of float16
    gm = s.returns(back, s.call("to", x, torch.float16))
    assert {node.name for node in narrowed(gm)} == {half.name, row.name, back.name}


def test_a_sum_that_passes_bfloat16_is_rounded_and_stays_finite() -> None:
    s = Sketch()
    half = s.call("to", s.parameter(), torch.bfloat16)
    gm = s.returns(s.call("to", half, torch.float64))
    assert {node.name for node in narrowed(gm)} == {half.name}


def test_float32_is_precise_enough_and_bfloat16_originals_lose_nothing() -> None:
    s = Sketch()
    p = s.parameter()
    single = s.call("to", p, torch.float32)
    q = s.parameter("q")
    q.meta["example_value"] = torch.nn.Parameter(q.meta["example_value"].to(torch.bfloat16))
    gm = s.returns(s.call(torch.sin, single), s.call(torch.sin, q))
    assert narrowed(gm) == frozenset()


def test_what_asks_for_no_gradient_has_none_to_sum() -> None:
    s = Sketch()
    gm = s.returns(s.call("to", s.call("detach", s.parameter()), torch.float16))
    assert narrowed(gm) == frozenset()
