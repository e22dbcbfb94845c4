"""``drop_identities``: in an evaluation, the argument stands for a view of all of it."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from fxparam.graph.passes.drop_identities import drop_identities
from tests.graph.sketch import Sketch, picture

aten = torch.ops.aten


def _evaluated(target: object, *args: object, evaluation: bool = True) -> GraphModule:
    s = Sketch()
    p, x = s.parameter(), s.input()
    call = s.evaluation if evaluation else s.call
    w = call(torch.exp, call(target, p, *args))
    return s.returns(s.call(operator.matmul, w, x))


def test_a_view_of_all_of_its_argument_goes() -> None:
    gm = _evaluated(aten.view.default, [3, 3])
    assert_expected_inline(
        picture(gm, drop_identities),
        """\
def forward(self, p, x):
view_default = torch.ops.aten.view.default(p, [3, 3])
exp = torch.exp(view_default)
matmul = exp @ x
return (matmul,)
---
def forward(self, p, x):
exp = torch.exp(p)
matmul = exp @ x
return (matmul,)""",
    )


def test_other_views_stay() -> None:
    for gm in (
        _evaluated(aten.t.default),  # other strides
        _evaluated(aten.view.dtype, torch.int64),
        _evaluated(aten.detach.default),  # no identity in backward
        _evaluated(aten.view.default, [3, 3], evaluation=False),  # the user's own
        _evaluated(aten.clone.default),
    ):
        before = gm.code
        drop_identities(gm)
        gm.recompile()
        assert gm.code == before


def test_a_view_that_is_returned_stays() -> None:
    s = Sketch()
    p = s.parameter()
    picture(
        s.returns(s.evaluation(aten.view.default, p, [3, 3])),
        drop_identities,
        **{"view.default": (1, 1)},
    )
