"""``scaling`` is as exact as torch's exponential, its derivative as torch's backward or better."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxparam.lowering import scaling
from tests.lowering.errors import errors

op = torch.ops.fxparam.matrix_exp
EPS = torch.finfo(torch.float32).eps


def _skew(*shape: int) -> Tensor:
    a = torch.randn(*shape)
    return a - a.mT


def _nilpotent(*shape: int) -> Tensor:
    return torch.randn(*shape).triu(1)


def _ill_conditioned(*shape: int) -> Tensor:
    """Return matrices with eigenvalues of very unlike size, far from orthogonal eigenvectors."""
    n = shape[-1]
    return torch.randn(*shape).tril(-1) * 3 + torch.diag(torch.logspace(-3, 0, n))


KINDS = {
    "general": torch.randn,
    "skew": _skew,
    "symmetric": lambda *shape: (a := torch.randn(*shape)) + a.mT,
    "nilpotent": _nilpotent,
    "ill-conditioned": _ill_conditioned,
    "complex": lambda *shape: torch.randn(*shape, dtype=torch.complex64),
    "skew-Hermitian": lambda *shape: (a := torch.randn(*shape, dtype=torch.complex64)) - a.mH,
}


def _exact(a: Tensor) -> Tensor:
    """Return torch's exponential, computed as one of several: of one alone it may be wrong.

    Source: https://github.com/pytorch/pytorch/issues/196592
    """
    return torch.matrix_exp(torch.stack([a, a]))[0]


def _check(matrices: list[Tensor]) -> None:
    """Errors are at most torch's, in the geometric mean; a unit in the last place may be luck."""
    theirs, ours = (
        torch.tensor([errors(f, _exact, a) for a in matrices]).clamp_min(1e-12).log().mean(0).exp()
        for f in (_exact, op)
    )
    assert (ours <= (1.3 * theirs).clamp_min(2 * EPS)).all(), (ours, theirs)


def _of_norm(norm: float, a: Tensor) -> Tensor:
    return a * (norm / torch.linalg.matrix_norm(a, 1))


@pytest.mark.parametrize("size", [2, 3, 8, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_torch(kind: str, size: int) -> None:
    torch.manual_seed(0)
    count = 40 if size < 10 else 8
    for norm in (1e-6, 1e-3, 0.1, 0.5, 1.0, 10.0, 40.0):
        _check([_of_norm(norm, KINDS[kind](size, size)) for _ in range(count)])


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("kind", ["general", "skew"])
def test_as_exact_as_torch_at_larger_sizes(kind: str, size: int) -> None:
    torch.manual_seed(0)
    _check([KINDS[kind](size, size) * 0.05])


@pytest.mark.parametrize("norm", [1e2, 1e3])
def test_skew_matrices_of_large_norm(norm: float) -> None:
    torch.manual_seed(0)
    _check([_of_norm(norm, _skew(16, 16)) for _ in range(8)])


def test_a_batch_of_unlike_norms() -> None:
    torch.manual_seed(0)
    for kind in ("general", "skew"):
        norms = torch.logspace(-6, 0, 8).view(2, 4, 1, 1)
        _check([KINDS[kind](2, 4, 16, 16) * norms for _ in range(8)])


@pytest.mark.parametrize(("dtype", "angle"), [(torch.float32, 0.5), (torch.float64, 0.04)])
def test_a_rotation_is_right_where_torch_errs(dtype: torch.dtype, angle: float) -> None:
    a = torch.tensor([[0, angle], [-angle, 0]], dtype=dtype)
    sine = math.sin(float(a[0, 1]))
    assert abs(float(op(a)[0, 1]) - sine) <= torch.finfo(dtype).eps


def test_in_float64_as_exact_as_torch() -> None:
    torch.manual_seed(0)
    for kind in ("general", "skew"):
        for norm in (1e-6, 1e-3, 0.03, 0.2, 1.0, 20.0):
            a = _of_norm(norm, KINDS[kind](24, 24).double())
            value, theirs = op(a), _exact(a)
            assert (value - theirs).norm() <= 1e-14 * max(1, norm) * theirs.norm()


@pytest.mark.parametrize("kind", ["skew", "symmetric"])
def test_normal_matrices_are_halved_less_often(kind: str) -> None:
    torch.manual_seed(0)
    a = KINDS[kind](1, 128, 128) * 0.1
    disturbed = a.clone()
    disturbed[0, 0, 1] += 1e-6
    normal, other = (scaling._plan(x) for x in (a, disturbed))
    assert normal is not None and other is not None
    assert normal.halvings[0] < other.halvings[0]


def test_no_plan_without_a_finite_norm() -> None:
    for number in (float("inf"), float("nan")):
        a = torch.zeros(2, 3, 3)
        a[1, 0, 2] = number
        assert scaling.exponential(a) is None
        assert scaling.derivative(a, a) is None


def test_matrices_of_zeros() -> None:
    a, e = torch.zeros(2, 3, 3), torch.randn(2, 3, 3)
    value, derivative = scaling.exponential(a), scaling.derivative(a, e)
    assert value is not None and derivative is not None
    torch.testing.assert_close(value, torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(derivative, e)


def test_tensors_are_not_written() -> None:
    a, e = _skew(2, 8, 8), torch.randn(2, 8, 8)
    before = a.clone(), e.clone()
    scaling.exponential(a)
    scaling.derivative(a, e)
    assert torch.equal(a, before[0]) and torch.equal(e, before[1])
