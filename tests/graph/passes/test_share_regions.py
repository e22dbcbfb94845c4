"""``share_regions``: what a ``cached()`` region evaluates twice is evaluated once, with effects."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule, Node

from fxparam import marks
from fxparam.graph.passes.share_regions import share_regions
from tests.graph.sketch import Sketch, count, levels, text

TRACE, CHAIN = 1, 7


def _mark(node: Node, *, number: int, region: int = 1, modes: str = "grad") -> Node:
    chain = marks.value(TRACE, CHAIN)
    node.meta["custom"] = {
        marks.REGION: marks.region(TRACE, region),
        marks.EVALUATION: marks.evaluation("", chain, "training", modes, number),
    }
    return node


def _masks(*accesses: dict[str, object]) -> GraphModule:
    """A mask drawn at each access; an access is what its mark says."""
    s = Sketch()
    p, x = s.parameter(), s.input()
    for number, mark in enumerate(accesses):
        w = _mark(s.call(torch.dropout, p, 0.5, True), number=number, **mark)  # type: ignore[arg-type]
        x = s.call(operator.matmul, w, x)
    return s.returns(x)


def _rewrite(gm: GraphModule) -> int:
    """Share in the regions of each graph, once more as well; how many nodes were taken out."""
    taken = sum(len(share_regions(level)) for level in levels(gm))
    gm.graph.lint()
    gm.recompile()
    after = text(gm)
    assert not any(share_regions(level) for level in levels(gm))
    assert text(gm) == after
    return taken


def test_a_mask_is_drawn_once_in_a_region() -> None:
    gm = _masks({}, {})
    before, inputs = text(gm), (torch.randn(3, 3), torch.randn(3, 3))
    assert _rewrite(gm) == 1
    assert_expected_inline(
        f"{before}\n---\n{text(gm)}",
        """\
def forward(self, p, x):
dropout = torch.dropout(p, 0.5, True)
matmul = dropout @ x
dropout_1 = torch.dropout(p, 0.5, True)
matmul_1 = dropout_1 @ matmul
return (matmul_1,)
---
def forward(self, p, x):
dropout = torch.dropout(p, 0.5, True)
matmul = dropout @ x
matmul_1 = dropout @ matmul
return (matmul_1,)""",
    )
    # The values are those of a region: one mask for both.
    torch.manual_seed(0)
    mask = torch.dropout(inputs[0], 0.5, True)
    torch.manual_seed(0)
    torch.testing.assert_close(gm(*inputs)[0], mask @ (mask @ inputs[1]))


def test_what_the_eager_region_tells_apart_is_drawn_again() -> None:
    for other in ({"region": 2}, {"modes": "no_grad"}):
        gm = _masks({}, other)
        assert _rewrite(gm) == 0
        assert count(gm)["dropout"] == 2


def test_an_original_that_is_written_in_between_is_evaluated_again() -> None:
    s = Sketch()
    p, x = s.input("p"), s.input()
    first = _mark(s.call(torch.dropout, p, 0.5, True), number=0)
    s.call("mul_", p, 1.5)
    again = _mark(s.call(torch.dropout, p, 0.5, True), number=1)
    gm = s.returns(s.call(operator.add, first, again), x)
    assert _rewrite(gm) == 0
