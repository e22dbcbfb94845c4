"""``drop_idle_switches``: switches of the grad mode with nothing between them go."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from fxparam.graph.passes.drop_idle_switches import drop_idle_switches
from tests.graph.sketch import Sketch, levels, picture

set_grad = torch._C._set_grad_enabled


def _drop(gm: GraphModule) -> None:
    for level in levels(gm):
        drop_idle_switches(level.gm, level.tables)


def _graph(*steps: bool | str) -> GraphModule:
    """Switches and, by name, methods in turn."""
    s = Sketch()
    x = s.parameter()
    for step in steps:
        x = s.call(step, x) if isinstance(step, str) else (s.note(set_grad, step), x)[1]
    return s.returns(x)


def test_a_pair_that_puts_back_what_was_goes() -> None:
    gm = _graph("sin", False, True, "cos")
    assert_expected_inline(
        picture(gm, _drop, _set_grad_enabled=(2, 0)),
        """\
def forward(self, p):
sin = p.sin()
_set_grad_enabled = torch._C._set_grad_enabled(False)
_set_grad_enabled_1 = torch._C._set_grad_enabled(True)
cos = sin.cos()
return (cos,)
---
def forward(self, p):
sin = p.sin()
cos = sin.cos()
return (cos,)""",
    )


def test_of_two_switches_in_a_row_the_last_one_stays() -> None:
    gm = _graph("sin", True, False, "cos", True)
    assert_expected_inline(
        picture(gm, _drop, _set_grad_enabled=(3, 2)),
        """\
def forward(self, p):
sin = p.sin()
_set_grad_enabled = torch._C._set_grad_enabled(True)
_set_grad_enabled_1 = torch._C._set_grad_enabled(False)
cos = sin.cos()
_set_grad_enabled_2 = torch._C._set_grad_enabled(True)
return (cos,)
---
def forward(self, p):
sin = p.sin()
_set_grad_enabled_1 = torch._C._set_grad_enabled(False)
cos = sin.cos()
_set_grad_enabled_2 = torch._C._set_grad_enabled(True)
return (cos,)""",
    )


def test_a_block_with_something_in_it_stays() -> None:
    picture(_graph("sin", False, "cos", True, "tan"), _drop, _set_grad_enabled=(2, 2))
