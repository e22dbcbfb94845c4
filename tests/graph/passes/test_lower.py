"""``lower``: which ops are rewritten, to what, and where torch's own stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import GraphModule

from fxparam.graph.analysis.effects import analyze
from fxparam.graph.passes.lower import Lowered, lower
from tests.graph.sketch import Sketch, picture

SIZE = 48
op = torch.ops.fxparam.matrix_exp


def _lower(gm: GraphModule, **options: Any) -> list[Lowered]:
    return lower(gm, **{"grad_enabled": True, "autocast_now": True, **options})


def _exponential(target: Any = torch.matrix_exp, **keywords: Any) -> GraphModule:
    s = Sketch()
    p, x = s.parameter("p", SIZE, SIZE), s.input("x", SIZE, SIZE)
    return s.returns(s.call(operator.matmul, s.evaluation(target, p, **keywords), x))


def test_an_exponential_becomes_our_op() -> None:
    assert _lower(_exponential()) == [Lowered("cell.weight", "matrix_exp", 1)]
    assert_expected_inline(
        picture(_exponential(), _lower),
        """\
def forward(self, p, x):
matrix_exp = torch.matrix_exp(p)
matmul = matrix_exp @ x
return (matmul,)
---
def forward(self, p, x):
matrix_exp_1 = torch.ops.fxparam.matrix_exp(p)
matmul = matrix_exp_1 @ x
return (matmul,)""",
    )


def test_reflectors_become_products() -> None:
    def drawn() -> GraphModule:
        s = Sketch()
        p, t = s.parameter("p", 5, 3), s.parameter("t", 3)
        q = s.evaluation(torch.linalg.householder_product, p, t)
        return s.returns(s.call(torch.exp, q))

    assert _lower(drawn()) == [Lowered("cell.weight", "householder_product", 1)]
    assert_expected_inline(
        picture(drawn(), _lower),
        """\
def forward(self, p, t):
linalg_householder_product = torch._C._linalg.linalg_householder_product(p, t)
exp = torch.exp(linalg_householder_product)
return (exp,)
---
def forward(self, p, t):
eye = torch.eye(3, 5, dtype = torch.float64, device = device(type='cpu'))
transpose = torch.transpose(eye, -2, -1)
tril = torch.tril(p, -1)
getitem = transpose.__getitem__((slice(None, None, None), slice(None, 3, None)))
add = tril.add(getitem)
unsqueeze = torch.unsqueeze(t, -1)
getitem_1 = transpose.__getitem__((slice(None, 3, None), slice(None, 3, None)))
adjoint = torch.adjoint(add)
matmul = adjoint.matmul(add)
triu = torch.triu(matmul, 1)
mul = unsqueeze.mul(triu)
add_1 = getitem_1.add(mul)
getitem_2 = add.__getitem__((Ellipsis, slice(None, 3, None), slice(None, None, None)))
adjoint_1 = torch.adjoint(getitem_2)
mul_1 = unsqueeze.mul(adjoint_1)
linalg_solve_triangular = torch._C._linalg.linalg_solve_triangular(add_1, mul_1, upper = True, unitriangular = True)
transpose_1 = torch.transpose(linalg_solve_triangular, -2, -1)
transpose_2 = torch.transpose(add, -2, -1)
matmul_1 = transpose_1.matmul(transpose_2)
sub = eye.sub(matmul_1)
transpose_3 = torch.transpose(sub, -2, -1)
exp = torch.exp(transpose_3)
return (exp,)""",  # noqa: E501
    )


def test_the_value_is_laid_out_as_before() -> None:
    gm = _reflectors()
    before = gm.graph.output_node().args[0][0].meta["example_value"]
    _lower(gm)
    after = gm.graph.output_node().args[0][0].meta["example_value"]
    assert after is not before and after.stride() == before.stride() != (3, 1)
    assert after.requires_grad


def test_our_op_has_no_effects() -> None:
    gm = _exponential()
    _lower(gm)
    (node,) = (n for n in gm.graph.nodes if n.target is op)
    effects = analyze(gm, grad_enabled=True).of[node]
    assert effects.pure and effects.known and not effects.raises


@pytest.mark.parametrize("target", [torch.linalg.matrix_exp, "matrix_exp"])
def test_other_spellings(target: Any) -> None:
    assert len(_lower(_exponential(target))) == 1


def test_a_computed_weight_without_a_list() -> None:
    s = Sketch()
    p, x = s.parameter("l_self_parameters_raw_", SIZE, SIZE), s.input("x", SIZE, SIZE)
    gm = s.returns(s.call(operator.matmul, s.call(torch.matrix_exp, p), x))
    assert _lower(gm) == [Lowered("matrix_exp(raw)", "matrix_exp", 1)]


def test_the_users_own_ops_stay() -> None:
    s = Sketch()
    x = s.input("x", SIZE, SIZE)
    assert _lower(s.returns(s.call(torch.matrix_exp, x))) == []


def test_without_gradients_torch_computes() -> None:
    assert _lower(_exponential(), grad_enabled=False) == []
    s = Sketch()
    p = s.input("p", SIZE, SIZE)  # an original that asks for none
    assert _lower(s.returns(s.evaluation(torch.matrix_exp, p))) == []


@pytest.mark.parametrize("shape", [(4, 4), (1, 1), (0, SIZE, SIZE)])
def test_small_matrices_are_torchs(shape: tuple[int, ...]) -> None:
    s = Sketch()
    assert _lower(s.returns(s.evaluation(torch.matrix_exp, s.parameter("p", *shape)))) == []


def _typed(dtype: torch.dtype) -> GraphModule:
    s = Sketch()
    p = s.parameter("p", SIZE, SIZE)
    return s.returns(s.evaluation(torch.matrix_exp, s.evaluation("to", p, dtype)))


def test_half_precision_is_torchs() -> None:
    assert [len(_lower(_typed(d))) for d in (torch.bfloat16, torch.float16)] == [0, 0]
    assert [len(_lower(_typed(d))) for d in (torch.float32, torch.complex64)] == [1, 1]


def _reflectors(around: Callable[[Sketch], None] = lambda s: None) -> GraphModule:
    s = Sketch()
    around(s)
    p, t = s.parameter("p", 5, 3), s.parameter("t", 3)
    return s.returns(s.evaluation(torch.linalg.householder_product, p, t))


def test_reflectors_under_autocast_are_torchs() -> None:
    def enter(s: Sketch) -> None:
        s.note(torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, True)

    assert len(_lower(_reflectors())) == 1
    assert _lower(_reflectors(), autocast_now=False) == []
    assert _lower(_reflectors(enter)) == []
    with torch.autocast("cpu"):
        assert _lower(_reflectors()) == []


def test_reflectors_are_torchs_where_products_lose_precision() -> None:
    def single() -> GraphModule:
        s = Sketch()
        p, t = s.parameter("p", 5, 3), s.parameter("t", 3)
        p, t = (s.evaluation("to", n, torch.float32) for n in (p, t))
        return s.returns(s.evaluation(torch.linalg.householder_product, p, t))

    assert len(_lower(single())) == 1
    torch.set_float32_matmul_precision("medium")
    try:
        assert _lower(single()) == []
        assert len(_lower(_reflectors())) == 1  # float64
    finally:
        torch.set_float32_matmul_precision("highest")


def test_shapes_that_torch_refuses_are_left_to_it() -> None:
    s = Sketch()
    p, t = s.parameter("p", 5, 3), s.parameter("t", 0)
    assert _lower(s.returns(s.evaluation(torch.linalg.householder_product, p, t))) == []


def _normed(shape: tuple[int, ...], norms: tuple[int, ...], dim: int, *types: Any) -> GraphModule:
    s = Sketch()
    v, g = s.parameter("v", *shape), s.parameter("g", *norms)
    v, g = (s.evaluation("to", n, *types) if types else n for n in (v, g))
    return s.returns(s.call(torch.exp, s.evaluation(torch._weight_norm, v, g, dim)))


def test_weight_norm_becomes_pointwise_operations() -> None:
    assert_expected_inline(
        picture(_normed((5, 3), (5, 1), 0), _lower),
        """\
def forward(self, v, g):
_weight_norm = torch._weight_norm(v, g, 0)
exp = torch.exp(_weight_norm)
return (exp,)
---
def forward(self, v, g):
linalg_vector_norm = torch._C._linalg.linalg_vector_norm(v, 2, [1], keepdim = True)
div = g.div(linalg_vector_norm)
mul = v.mul(div)
exp = torch.exp(mul)
return (exp,)""",
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_weight_norm_along_other_dimensions(enabled: bool) -> None:
    for given in (((5, 3), (1, 3), 1), ((5, 3, 2), (1, 3, 1), 1)):
        assert len(_lower(_normed(*given), grad_enabled=enabled)) == 1
    s = Sketch()
    v, g = s.parameter("v", 5, 3), s.call(torch.sum, s.parameter("g"))
    gm = s.returns(s.evaluation(torch._weight_norm, v, g, -1))
    assert len(_lower(gm, grad_enabled=enabled)) == 1


@pytest.mark.parametrize(
    "given", [((5, 5), (5,), 0), ((5,), (5,), 0), ((5, 3), (5, 1), 0, torch.bfloat16)]
)
def test_weight_norms_that_torch_computes_otherwise_are_left_to_it(given: Any) -> None:
    assert _lower(_normed(*given)) == []


def test_an_exponential_in_a_body() -> None:
    def body(inner: Sketch, p: Any) -> GraphModule:
        return inner.returns(inner.evaluation(torch.matrix_exp, p))

    s = Sketch()
    p = s.parameter("p", SIZE, SIZE)
    inner = Sketch(around=s)
    module = body(inner, inner.like("q", p))
    checkpoint = torch.ops.higher_order.tag_activation_checkpoint
    call = s.note(checkpoint, s.attribute("body", module), p, value=(p.meta["example_value"],))
    gm = s.returns(call)
    assert _lower(gm) == [Lowered("cell.weight", "matrix_exp", 1)]
    assert op in {n.target for n in module.graph.nodes}


def test_the_metadata_of_the_call_stay() -> None:
    gm = _exponential()
    (old,) = (n for n in gm.graph.nodes if n.target is torch.matrix_exp)
    stack = old.meta["nn_module_stack"]
    _lower(gm)
    (new,) = (n for n in gm.graph.nodes if n.target is op)
    assert new.meta["nn_module_stack"] == stack
    assert isinstance(new.meta["example_value"], Tensor)
