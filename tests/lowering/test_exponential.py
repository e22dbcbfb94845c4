"""``matrix_exp``: an op like torch's own in everything but its cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxparam.lowering.exponential import matrix_exp
from tests.lowering.errors import results

op = torch.ops.fxparam.matrix_exp
derivative = torch.ops.fxparam.matrix_exp_derivative
close = torch.testing.assert_close
SIZE = 48  # the function takes the op from here on


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_derivatives_of_first_and_second_order(dtype: torch.dtype, scale: float) -> None:
    a = (_random(2, 3, 3, dtype=dtype) * scale).requires_grad_()
    e = (_random(2, 3, 3, dtype=dtype).flip(0) * 5).requires_grad_()
    for function, inputs in ((op, (a,)), (derivative, (a, e))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(4, 0, 0), (0, 3, 3)])
def test_of_no_numbers(shape: tuple[int, ...]) -> None:
    a = _random(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(op(a).sum(), a, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), a)[0].shape == shape


def test_the_derivative_in_a_direction_alone() -> None:
    a, e = _random(3, 3), _random(3, 3).mT.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(derivative, (a, e))
    assert torch.autograd.gradgradcheck(derivative, (a, e))
    close(derivative(a, torch.zeros_like(a)), torch.zeros_like(a))


def test_a_third_derivative() -> None:
    def third(function: object, a: Tensor) -> Tensor:
        value = function(a)  # type: ignore[operator]
        for _ in range(3):
            (value,) = torch.autograd.grad(value.square().sum(), a, create_graph=True)
        return value.detach()

    a = (_random(3, 3) * 0.3).requires_grad_()
    close(third(op, a), third(torch.matrix_exp, a))


def test_it_declares_what_it_does() -> None:
    a, e = _random(2, 3, 3).requires_grad_(), _random(2, 3, 3).requires_grad_()
    torch.library.opcheck(op.default, (a,))
    torch.library.opcheck(derivative.default, (a, e))
    assert op(torch.empty(2, 3, 3, device="meta")).shape == (2, 3, 3)


@pytest.mark.parametrize(
    "a",
    [
        torch.zeros(0, 3, 3),
        torch.zeros(3, 0, 0),
        torch.full((2, 1, 1), 0.5),
        torch.tensor([[float("nan"), 1.0], [0.0, 0.0]]),
        torch.tensor([[float("inf"), 1.0], [0.0, 0.0]]),
        torch.zeros(3, 3),
    ],
    ids=["no matrices", "no rows", "numbers", "nan", "inf", "zeros"],
)
def test_corners_are_as_torch_has_them(a: Tensor) -> None:
    close(results(op, a), results(torch.matrix_exp, a), equal_nan=True)


@pytest.mark.parametrize("given", [torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 2).long()])
def test_what_torch_refuses_is_refused_with_its_words(given: Tensor) -> None:
    with pytest.raises(RuntimeError) as theirs:
        torch.matrix_exp(given)
    for function in (op, matrix_exp):
        with pytest.raises(RuntimeError) as ours:
            function(given)
        assert str(ours.value) == str(theirs.value)


def test_memory_is_laid_out_as_torch_does() -> None:
    matrices = _random(3, 3).mT, _random(3, 2, 3).transpose(0, 1), _random(3, 3, 2)[..., 0]
    for a in (*matrices, _random(4, 3, 3).mT, _random(4, 3, 3).movedim(0, -1)[:3].movedim(-1, 0)):
        for max_bytes in (0, 1):
            assert op(a, max_bytes).stride() == torch.matrix_exp(a).stride()
            close(op(a, max_bytes), torch.matrix_exp(a))


@pytest.mark.parametrize("max_bytes", [1, 17 * 9 * 8 * 2])
def test_a_batch_in_parts(max_bytes: int) -> None:
    a, direction = (_random(2, 3, 3, 3).requires_grad_() for _ in range(2))
    a.data[1] *= 20
    whole, parts = op(a), op(a, max_bytes)
    close(parts, whole)
    given = (direction.detach(), a)
    close(*(torch.autograd.grad(y, a, given[0])[0] for y in (parts, whole)))
    derivative = torch.ops.fxparam.matrix_exp_derivative
    twice = (derivative(a, direction), derivative(a, direction, max_bytes))
    close(*twice)
    for x in (a, direction):
        close(*(torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for y in twice))
    broken = a.detach().clone()
    broken[1, 0, 0, 0] = torch.inf
    close(op(broken, max_bytes), op(broken), equal_nan=True)


def test_vmap_and_batched_cotangents() -> None:
    a = _random(3, 4, 4).requires_grad_()
    apart = torch.vmap(op, in_dims=1, out_dims=1)(a.movedim(0, 1)).movedim(1, 0)
    close(apart, torch.matrix_exp(a))
    close(*(torch.autograd.grad(y.square().sum(), a)[0] for y in (apart, torch.matrix_exp(a))))
    every = torch.eye(16, dtype=a.dtype).view(16, 4, 4)
    rows = [torch.autograd.grad(f(a[0]), a, every, is_grads_batched=True) for f in (op, _torch)]
    close(*rows)


def _torch(a: Tensor) -> Tensor:
    return torch.matrix_exp(a)


def test_autocast_does_not_reach_inside() -> None:
    a = (_random(8, 8, dtype=torch.float32) * 2).requires_grad_()
    with torch.autocast("cpu"):
        value = op(a)
        (gradient,) = torch.autograd.grad(value.sum(), a)
    close([value, gradient], [op(a), torch.autograd.grad(op(a).sum(), a)[0]], rtol=0, atol=0)


def test_products_of_less_precision_leave_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxparam.lowering.exponential.multiplies_exactly", lambda *_: False)
    a = _random(3, 3) * 0.3
    close(results(op, a), results(torch.matrix_exp, a))
    assert torch.equal(op(a), torch.matrix_exp(a))


# --- the function ------------------------------------------------------------------------------


def _node(value: Tensor) -> str:
    return type(value.grad_fn).__name__


def test_the_op_where_a_gradient_is_asked_for() -> None:
    a = _random(SIZE, SIZE).requires_grad_()
    assert "fxparam_matrix_exp" in _node(matrix_exp(a))
    with torch.no_grad():
        assert torch.equal(matrix_exp(a), torch.matrix_exp(a))
    small = _random(4, 4).requires_grad_()
    assert "fxparam_matrix_exp" not in _node(matrix_exp(small))


def test_transforms_get_what_torch_computes() -> None:
    a = (_random(SIZE, SIZE) / SIZE).requires_grad_()

    def first(function: object) -> object:
        return lambda x: function(a + x).sum(1)  # type: ignore[operator]

    x = torch.zeros((), dtype=a.dtype)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        close(transform(first(matrix_exp))(x), transform(first(torch.matrix_exp))(x))
    tangent = torch.ones_like(x)
    close(*(torch.func.jvp(first(f), (x,), (tangent,)) for f in (matrix_exp, torch.matrix_exp)))
    with forward_ad.dual_level():
        dual = matrix_exp(forward_ad.make_dual(a, torch.ones_like(a)))
        assert forward_ad.unpack_dual(dual).tangent is not None


def test_compiled_in_one_graph() -> None:
    a = _random(SIZE, SIZE)
    for function in (matrix_exp, op):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        close(results(compiled, a), results(torch.matrix_exp, a))
