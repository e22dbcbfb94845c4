"""Which values of a graph a gradient may come back to."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Node

from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.gradients import is_tracked, reached_by_gradients
from tests.graph.sketch import Sketch

aten = torch.ops.aten


def _used(s: Sketch, w: Node, how: str) -> Node:
    """What becomes of a value."""
    if how == "under no_grad":
        s.note(torch._C._set_grad_enabled, False)
        result = s.call(torch.neg, w)
        s.note(torch._C._set_grad_enabled, True)
        return result
    return {
        "computed with": lambda: s.call(torch.neg, w),
        "returned": lambda: w,
        "detach()": lambda: s.call("detach", w),
        "torch.detach": lambda: s.call(torch.detach, w),
        "aten.detach": lambda: s.call(aten.detach.default, w),
        "compared": lambda: s.call(torch.gt, w, 0),
        "its largest index": lambda: s.call(torch.argmax, w),
    }[how]()


@pytest.mark.parametrize(
    ("how", "reached"),
    [
        ("computed with", True),
        ("returned", True),
        ("under no_grad", False),
        ("detach()", False),
        ("torch.detach", False),
        ("aten.detach", False),
        ("compared", False),
        ("its largest index", False),
    ],
)
def test_uses(how: str, reached: bool) -> None:
    s = Sketch()
    w = s.call(torch.exp, s.parameter())
    gm = s.returns(_used(s, w, how))
    table = analyze(gm, grad_enabled=True)
    assert (w in reached_by_gradients(gm.graph, table)) is reached


def test_one_use_is_enough() -> None:
    s = Sketch()
    p = s.parameter()
    w = s.call(torch.exp, p)
    product = s.call(operator.matmul, s.call("detach", w), w)
    gm = s.returns(product)
    assert {p, w, product} <= reached_by_gradients(gm.graph, analyze(gm, grad_enabled=True))


def test_what_is_there_for_its_effect_counts_as_a_result() -> None:
    s = Sketch()
    w, x = s.call(torch.exp, s.parameter()), s.input()
    s.call("copy_", x, w)
    gm = s.returns()
    assert w in reached_by_gradients(gm.graph, analyze(gm, grad_enabled=True))


def test_what_autograd_may_record() -> None:
    s = Sketch()
    p, x = s.parameter(), s.input()
    nodes: list[Any] = [p, s.call(torch.exp, p), x, s.call(torch.exp, x), s.call("detach", p)]
    assert list(map(is_tracked, nodes)) == [True, True, False, False, False]
    unknown = s.graph.placeholder("unknown")
    assert is_tracked(unknown)
