"""The polynomials are the Taylor polynomials of the exponential, to their degree."""

from __future__ import annotations

import math

import pytest
import torch

from fxparam.lowering.taylor import POLYNOMIALS, Polynomial, evaluate, room_for


def _named(polynomial: Polynomial) -> str:
    return f"degree {polynomial.degree}"


def _of_a_shift(polynomial: Polynomial, size: int) -> torch.Tensor:
    """Return a polynomial of the matrix that shifts: its powers stand beside the diagonal."""
    a = torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)[None]
    terms = room_for(polynomial, a)
    terms[0], terms[1] = a, a @ a
    return evaluate(polynomial, [terms])[0][0]


@pytest.mark.parametrize("polynomial", POLYNOMIALS, ids=_named)
def test_the_coefficients_are_those_of_the_exponential(polynomial: Polynomial) -> None:
    coefficients = _of_a_shift(polynomial, polynomial.degree + 1)[0]
    for power, coefficient in enumerate(coefficients.tolist()):
        # The published numbers have as many digits as the norms they are used for ask for.
        weight = polynomial.norms[1] ** power
        assert abs(coefficient - 1 / math.factorial(power)) * weight < 4e-16, power


@pytest.mark.parametrize("polynomial", POLYNOMIALS, ids=_named)
def test_the_derivative_is_that_of_the_polynomial(polynomial: Polynomial) -> None:
    torch.manual_seed(0)
    a, e = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def value(a: torch.Tensor) -> torch.Tensor:
        terms = room_for(polynomial, a)
        terms[0], terms[1] = a, a @ a
        return evaluate(polynomial, [terms])[0]

    terms, directions = room_for(polynomial, a), room_for(polynomial, a)
    terms[0], terms[1] = a, a @ a
    directions[0], directions[1] = e, a @ e + e @ a
    step = 1e-6
    difference = (value(a + step * e) - value(a - step * e)) / (2 * step)
    for alone in (False, True):
        _, derivative = evaluate(polynomial, [terms, directions], derivative_alone=alone)
        torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-6)
