"""What is moved out of a checkpointed region keeps the region's policy."""

from __future__ import annotations

import operator
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fxparam.graph import hoist
from fxparam.graph.passes.checkpoint_policy import is_recomputed
from tests.graph.sketch import Sketch, graphs, picture

POLICY = "_checkpoint_context_fn"  # where Dynamo leaves a checkpoint's context_fn


def _recompute(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(*, policy: bool) -> GraphModule:
    s = Sketch()
    p, x = s.parameter(), s.input()
    b = Sketch(s)
    h, q = b.like("h", x), b.like("q", p)
    region = b.returns(b.call(operator.matmul, b.call(torch.matrix_exp, q), h))
    if policy:
        region.meta[POLICY] = partial(create_selective_checkpoint_contexts, _recompute)
    body = s.attribute("body", region)
    for _ in range(2):
        call = s.note(torch.ops.higher_order.tag_activation_checkpoint, body, x, p, value=(x,))
        x = s.call(operator.getitem, call, 0)
    return s.returns(x)


def _hoist(gm: GraphModule) -> None:
    hoist(gm, grad_enabled=True)


def test_without_a_policy_the_value_is_saved_where_it_enters() -> None:
    assert_expected_inline(
        picture(_checkpointed(policy=False), _hoist, matrix_exp=(1, 1)),
        """\
def forward(self, p, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, q):
matrix_exp = torch.matrix_exp(q)
matmul = matrix_exp @ h
return (matmul,)
---
def forward(self, p, x):
body = self.body
matrix_exp = torch.matrix_exp(p)
tag_activation_checkpoint = tag_activation_checkpoint(body, x, matrix_exp)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, matrix_exp)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, matrix_exp_1):
matmul = matrix_exp_1 @ h
return (matmul,)""",
    )


# torch itself, where a region with a policy runs outside of a compiled graph.
@pytest.mark.filterwarnings("ignore:.*context_fn.*:UserWarning")
def test_with_a_policy_a_region_of_its_own_makes_the_value() -> None:
    gm = _checkpointed(policy=True)
    policy = gm.body.meta[POLICY]
    drawn = picture(gm, _hoist, matrix_exp=(1, 1))
    ((name, made),) = ((n, m) for n, m in graphs(gm).items() if is_recomputed(m))
    assert made.meta[POLICY] is policy
    assert_expected_inline(
        drawn.replace(name, "moved_region"),
        """\
def forward(self, p, x):
body = self.body
tag_activation_checkpoint = tag_activation_checkpoint(body, x, p)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, p)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, q):
matrix_exp = torch.matrix_exp(q)
matmul = matrix_exp @ h
return (matmul,)
---
def forward(self, p, x):
body = self.body
moved_region = self.moved_region
tag_activation_checkpoint_2 = tag_activation_checkpoint(moved_region, p)
getitem_2 = tag_activation_checkpoint_2[0]
tag_activation_checkpoint = tag_activation_checkpoint(body, x, getitem_2)
getitem = tag_activation_checkpoint[0]
tag_activation_checkpoint_1 = tag_activation_checkpoint(body, getitem, getitem_2)
getitem_1 = tag_activation_checkpoint_1[0]
return (getitem_1,)
def body(self, h, matrix_exp_1):
matmul = matrix_exp_1 @ h
return (matmul,)
def moved_region(self, p):
matrix_exp = torch.matrix_exp(p)
return (matrix_exp,)""",
    )
