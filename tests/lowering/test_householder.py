"""``householder_product`` by compact WY: torch's values, and gradients as exact or better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxparam.lowering.householder import compact_wy, householder_product
from tests.lowering.errors import errors

close = torch.testing.assert_close
EPS = torch.finfo(torch.float32).eps


def _orthogonal(*shape: int) -> tuple[Tensor, Tensor]:
    """Return reflectors with the tau that makes them orthogonal, as torch's ``orthogonal`` does."""
    a = torch.randn(*shape) * 0.3
    return a, 2 / (1 + a.tril(-1).square().sum(-2))


def _contracting(*shape: int) -> tuple[Tensor, Tensor]:
    a, tau = _orthogonal(*shape)
    return a, tau * torch.rand_like(tau)


def _complex(*shape: int) -> tuple[Tensor, Tensor]:
    a, tau = torch.geqrf(torch.randn(*shape, dtype=torch.complex64))
    return a, tau


KINDS = {
    "orthogonal": _orthogonal,
    "of a QR decomposition": lambda *shape: tuple(torch.geqrf(torch.randn(*shape))),
    "tiny": lambda *shape: (torch.randn(*shape) * 1e-6, torch.full((*shape[:-2], shape[-1]), 2.0)),
    "contracting": _contracting,
    "complex": _complex,
}


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 16), (64, 32), (3, 24, 12), (128, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_torch(kind: str, shape: tuple[int, ...]) -> None:
    """The value within a factor of 2, a gradient within its error or some units."""
    torch.manual_seed(0)
    given = [KINDS[kind](*shape) for _ in range(6)]
    theirs, ours = (
        torch.tensor([errors(f, torch.orgqr, *each) for each in given]).square().mean(0).sqrt()
        for f in (torch.orgqr, compact_wy)
    )
    allowed = torch.tensor([2.0, 1.5, 1.5]) * theirs
    assert (ours <= allowed.clamp_min(4 * EPS)).all(), (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reflectors", [1, 2, 3])
def test_derivatives_of_first_and_second_order(dtype: torch.dtype, reflectors: int) -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)
    for tau in (torch.randn(2, reflectors, dtype=dtype), torch.zeros(2, reflectors, dtype=dtype)):
        tau.requires_grad_()
        close(compact_wy(a, tau), torch.orgqr(a, tau))
        assert torch.autograd.gradcheck(compact_wy, (a, tau))
        assert torch.autograd.gradgradcheck(compact_wy, (a, tau))


def test_what_is_not_below_the_diagonal_is_not_read() -> None:
    a, tau = _orthogonal(5, 3)
    above = torch.full_like(a, float("nan")).triu()
    close(compact_wy(a.tril(-1) + above, tau), torch.orgqr(a, tau))


def test_memory_is_laid_out_as_torch_does() -> None:
    for shape in ((5, 3), (2, 5, 3), (4, 4)):
        a, tau = _orthogonal(*shape)
        assert compact_wy(a, tau).stride() == torch.orgqr(a, tau).stride()


def test_transforms() -> None:
    a, tau = (x.double() for x in _orthogonal(3, 5, 2))
    close(torch.vmap(compact_wy)(a, tau), torch.orgqr(a, tau))
    # torch's own backward has no rule for batches, which jacrev asks for.
    right = torch.autograd.functional.jacobian(torch.orgqr, (a[0], tau[0]))
    for function in (compact_wy, householder_product):
        close(torch.func.jacrev(function, argnums=(0, 1))(a[0], tau[0]), right)
    close(torch.func.jacfwd(compact_wy, argnums=(0, 1))(a[0], tau[0]), right)


# --- the function ------------------------------------------------------------------------------


def _is_torch(value: Tensor) -> bool:
    return value.grad_fn is None or "HouseholderProduct" in type(value.grad_fn).__name__


def test_the_form_where_a_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    a, tau = _orthogonal(5, 3)
    assert torch.equal(householder_product(a, tau), torch.orgqr(a, tau))
    a.requires_grad_()
    assert not _is_torch(householder_product(a, tau))
    with torch.no_grad():
        assert torch.equal(householder_product(a, tau), torch.orgqr(a, tau))
    with torch.autocast("cpu"):
        assert _is_torch(householder_product(a, tau))
    monkeypatch.setattr("fxparam.lowering.householder.multiplies_exactly", lambda *_: False)
    assert _is_torch(householder_product(a, tau))


def test_what_torch_refuses_is_refused_with_its_words() -> None:
    a = torch.zeros(3, 5, requires_grad=True)
    for tau in (torch.zeros(5), torch.zeros(6), torch.zeros(2, 3), torch.zeros(3).double()):
        with pytest.raises(RuntimeError) as theirs:
            torch.orgqr(a, tau)
        with pytest.raises(RuntimeError) as ours:
            householder_product(a, tau)
        assert str(ours.value) == str(theirs.value)


def test_compiled_in_one_graph() -> None:
    a, tau = (x.double() for x in _orthogonal(8, 4))
    compiled = torch.compile(householder_product, backend="aot_eager", fullgraph=True)
    close(compiled(a.requires_grad_(), tau), torch.orgqr(a, tau))
