"""Taylor polynomials of the matrix exponential in few matrix products, with their derivative.

A polynomial is a list of products of linear combinations of what came before. It starts from the
identity I, the matrix A and its square:

    I, A, B = A A, C = (l0 I + l1 A + l2 B) (r0 I + r1 A + r2 B), ...;  p(A) = o0 I + o1 A + ...

The derivative of a product L R in a direction is dL R + L dR: three products in place of one.

The polynomials of degree 8, 12 and 18 take three, four and five products. They, and the norms up to
which each degree is exact to rounding, are those of Bader, Blanes and Casas, Computing the Matrix
Exponential with an Optimized Taylor Polynomial Approximation, Mathematics 7 (2019), 1174, which
``torch.matrix_exp`` computes with as well: https://www.mdpi.com/2227-7390/7/12/1174
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["POLYNOMIALS", "Pair", "Polynomial", "evaluate", "multiply", "room_for"]

#: A value, and its derivative where there is one.
Pair = list[Tensor]
_Row = tuple[float, ...]


@dataclass(frozen=True)
class Polynomial:
    """Attributes:
    degree: of the Taylor polynomial.
    norms: the largest norm for which it is exact to rounding, in float32 and in float64.
    products: after the square, the factors of each product, as combinations of the terms so far.
    result: the value, as a combination of all terms.
    """

    degree: int
    norms: tuple[float, float]
    products: tuple[tuple[_Row, _Row], ...]
    result: _Row

    def norm_for(self, dtype: torch.dtype) -> float:
        """Return the largest norm for which the polynomial is exact to rounding."""
        return self.norms[torch.finfo(dtype).bits > 32]


def _degree_8() -> Polynomial:
    root = math.sqrt(177)
    x3 = 2 / 3
    x1, x2 = x3 * (1 + root) / 88, x3 * (1 + root) / 352
    x4, x5 = (-271 + 29 * root) / (315 * x3), (-11 + 11 * root) / (1260 * x3)
    x6, x7 = (-99 + 11 * root) / (5040 * x3), (89 - root) / (5040 * x3**2)
    products = (
        ((0, 0, 1), (0, x1, x2)),
        ((0, 0, x3, 1), (x4, x5, x6, x7)),
    )
    result = (1, 1, (857 - 58 * root) / 630, 0, 1)
    return Polynomial(8, (5.800524627688768e-01, 4.991228871115323e-02), products, result)


def _degree_12() -> Polynomial:
    b = (
        (9.0198e-16, 0.46932117595418237389, -0.20099424927047284052, -0.04623946134063071740),
        (5.31597895759871264183, 1.19926790417132231573, 0.01179296240992997031),
        (0.18188869982170434744, 0.05502798439925399070, 0.09351590770535414968),
        (-2.0861320e-13, -0.13181061013830184015, -0.02027855540589259079, -0.00675951846863086359),
    )
    b1, b2 = (*b[1], 0.01108844528519167989), (*b[2], 0.00610700528898058230)
    products = (
        ((0, 0, 1), (0, 1)),  # the cube
        (b[3], b[3]),
        ((*_sum(b1, b2), 1), (*b2, 1)),
    )
    norms = (1.461661507209034e00, 2.996158913811580e-01)
    return Polynomial(12, norms, products, (*b[0], 0, 1))


def _degree_18() -> Polynomial:
    b = (
        (0, -1.00365581030144618291e-01, -8.02924648241156932449e-03, -8.92138498045729985177e-04),
        (0, 3.97849749499645077844e-01, 1.36783778460411720168e00, 4.98289622525382669416e-01),
        (-1.09676396052962061844e01, 1.68015813878906206114e00, 5.71779846478865511061e-02),
        (-9.04316832390810593223e-02, -6.76404519071381882256e-02, 6.75961301770459654925e-02),
        (0, 0, -9.23364619367118555360e-02, -1.69364939002081722752e-02),
    )
    b1 = (*b[1], -6.37898194594723280150e-04)
    b2 = (*b[2], -6.98210122488052056106e-03, 3.34975017086070470649e-05)
    b3 = (*b[3], 2.95552570429315521194e-02, -1.39180257516060693404e-05)
    b4 = (*b[4], -1.40086798182036094347e-05)
    products = (
        ((0, 0, 1), (0, 1)),  # the cube
        ((0, 0, 0, 1), (0, 0, 0, 1)),  # the sixth power
        (b[0], b4),
        ((*_sum(b2, b3), 1), (*b3, 1)),
    )
    norms = (3.010066362817634e00, 1.090863719290036e00)
    return Polynomial(18, norms, products, (*b1, 0, 1))


def _sum(one: _Row, other: _Row) -> _Row:
    return tuple(p + q for p, q in zip(one, other, strict=True))


#: By degree; the last one is for matrices that are scaled.
POLYNOMIALS = (
    Polynomial(
        4,
        (5.116619363445086e-02, 3.397168839976962e-04),
        (((0, 0, 1), (1 / 2, 1 / 6, 1 / 24)),),
        (1, 1, 0, 1),
    ),
    _degree_8(),
    _degree_12(),
    _degree_18(),
)


def evaluate(polynomial: Polynomial, terms: Pair, *, derivative_alone: bool = False) -> Pair:
    """Return a polynomial of matrices, and its derivative where the terms have one.

    Args:
        polynomial: one of ``POLYNOMIALS``.
        terms: values, and derivatives in one direction or nothing. Each begins with the matrices
            and their squares, and has room for the products, which are written: shape
            ``(terms, batch, n, n)``.
        derivative_alone: the value is not needed, and what is returned for it undefined.

    Returns:
        Value and derivative, shape ``(batch, n, n)`` each.
    """
    last = len(polynomial.products) + 1
    for place, rows in enumerate(polynomial.products, start=2):
        known = [part[:place] for part in terms]
        left, right = _factors(known, rows)
        out = [part[place] for part in terms]
        multiply(left, right, out, derivative_alone=derivative_alone and place == last)
    result = [
        part[0] if derivative_alone and not order else _combined(part, (polynomial.result,), order)
        for order, part in enumerate(terms)
    ]
    return [part.view(terms[0].shape[1:]) for part in result]


def room_for(polynomial: Polynomial, a: Tensor) -> Tensor:
    """Return new memory for the terms of a polynomial of ``a``, as ``evaluate`` takes them."""
    return a.new_empty(len(polynomial.products) + 2, *a.shape)


def multiply(left: Pair, right: Pair, out: Pair, *, derivative_alone: bool = False) -> None:
    """Write the product of two values, and its derivative where there is one."""
    if not derivative_alone:
        torch.bmm(left[0], right[0], out=out[0])
    if len(out) > 1:
        torch.bmm(left[0], right[1], out=out[1])
        out[1].baddbmm_(left[1], right[0])


def _factors(terms: Pair, rows: tuple[_Row, _Row]) -> tuple[Pair, Pair]:
    """Return the factors of a product; a single term is not copied."""
    places = [_only_term(row) for row in rows]
    made = [row for row, place in zip(rows, places, strict=True) if place is None]
    needed = tuple(dict.fromkeys(made))
    combined = [_combined(part, needed, order) for order, part in enumerate(terms)]
    left, right = (
        [part[place] for part in terms]
        if place is not None
        else [part[needed.index(row)] for part in combined]
        for row, place in zip(rows, places, strict=True)
    )
    return left, right


def _only_term(row: _Row) -> int | None:
    """Return the place of the term that a row names, if it is one term with coefficient 1."""
    named = [i for i, c in enumerate(row) if c]
    return named[0] - 1 if len(named) == 1 and named[0] and row[named[0]] == 1 else None


def _combined(terms: Tensor, rows: tuple[_Row, ...], order: int) -> Tensor:
    """Return linear combinations of the identity and the terms, made in one product.

    Args:
        terms: shape ``(terms, batch, n, n)``.
        rows: the coefficients of each combination.
        order: 0 for values, 1 for derivatives, in which the identity does not count.

    Returns:
        Shape ``(rows, batch, n, n)``.
    """
    if not rows:
        return terms[:0]
    numbers = torch.view_as_real(terms) if terms.is_complex() else terms
    coefficients = _coefficients(rows, len(terms), numbers.dtype, numbers.device)
    made = torch.mm(coefficients, numbers.view(len(terms), -1)).view(-1, *numbers.shape[1:])
    made = torch.view_as_complex(made) if terms.is_complex() else made
    for place, row in enumerate(rows if not order else ()):
        if row[0]:
            made[place].diagonal(dim1=-2, dim2=-1).add_(row[0])
    return made


@functools.lru_cache(maxsize=256)
def _coefficients(
    rows: tuple[_Row, ...], terms: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return rows as a matrix, without the coefficients of the identity."""
    padded = [[*row[1:], *(0.0 for _ in range(terms + 1 - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device)
