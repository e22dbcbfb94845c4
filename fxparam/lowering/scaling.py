"""Scaling and squaring: exp(A) = exp(A / 2^s)^(2^s), with its derivative in a direction.

``torch.matrix_exp`` computes the value by the same scheme. It takes the derivative from the
exponential of a matrix of twice the size, whose norm counts the direction's as well; here it is
carried through each product, as by Al-Mohy and Higham, Computing the Frechet Derivative of the
Matrix Exponential, SIAM J. Matrix Anal. Appl. 30 (2009), 1639. That costs two products for each one
of the value's.

A normal matrix needs fewer squarings. What counts is its largest eigenvalue, of which its 1-norm
may be many times as large, and of which the Frobenius norm of its square tells more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxparam.lowering.taylor import POLYNOMIALS, Pair, Polynomial, evaluate, multiply, room_for

__all__ = ["derivative", "exponential"]


@dataclass
class _Plan:
    """How the exponentials of a batch are computed.

    Attributes:
        polynomial: one for all, as the largest matrix needs it.
        halvings: for each matrix, how often it is halved, and its polynomial squared.
        halved: the matrices, halved.
        square: of the halved matrices.
    """

    polynomial: Polynomial
    halvings: list[int]
    halved: Tensor
    square: Tensor

    def terms(self, a: Tensor) -> Tensor:
        """Return the terms of the polynomial, of which two are known."""
        terms = room_for(self.polynomial, a)
        terms[0], terms[1] = self.halved, self.square
        self.halved, self.square = terms[0], terms[1]  # the memory of the others is free
        return terms


def exponential(a: Tensor) -> Tensor | None:
    """Return the exponentials of a batch of matrices; None if a norm is not finite.

    Args:
        a: shape ``(batch, n, n)`` with ``batch`` and ``n`` of at least 1; float32, float64, or
            complex of these.
    """
    plan = _plan(a)
    if plan is None:
        return None
    (value,) = _squared(evaluate(plan.polynomial, [plan.terms(a)]), plan.halvings)
    return value


def derivative(a: Tensor, direction: Tensor) -> Tensor | None:
    """Return the derivatives of the exponential at a batch of matrices, each in one direction.

    Args:
        a: as for ``exponential``.
        direction: of the same shape and dtype.

    Returns:
        None if the norm of a matrix of ``a`` is not finite.
    """
    plan = _plan(a)
    if plan is None:
        return None
    terms, directions = plan.terms(a), room_for(plan.polynomial, a)
    directions[0] = _scaled(direction, [-n for n in plan.halvings])
    torch.bmm(directions[0], plan.halved, out=directions[1])
    directions[1].baddbmm_(plan.halved, directions[0])
    # The value is only needed to be squared.
    alone = not any(plan.halvings)
    result = evaluate(plan.polynomial, [terms, directions], derivative_alone=alone)
    return _squared(result, plan.halvings)[1]


def _plan(a: Tensor) -> _Plan | None:
    least, largest = (POLYNOMIALS[i].norm_for(a.dtype) for i in (0, -1))
    norms = a.abs().sum(-2).amax(-1).tolist()
    if not all(map(math.isfinite, norms)):
        return None
    halvings = [_halvings(norm, largest) for norm in norms]
    halved = _scaled(a, [-n for n in halvings])
    square = torch.bmm(halved, halved)
    if max(norms) > least and _is_normal(a):
        roots = torch.linalg.vector_norm(square, dim=(-2, -1)).sqrt().tolist()
        bounds = [math.ldexp(root, n) for root, n in zip(roots, halvings, strict=True)]
        norms = list(map(min, norms, bounds))
        back = [n - _halvings(norm, largest) for norm, n in zip(norms, halvings, strict=True)]
        halvings = [n - b for n, b in zip(halvings, back, strict=True)]
        halved, square = _scaled(halved, back), _scaled(square, [2 * b for b in back])
    most = max(math.ldexp(norm, -n) for norm, n in zip(norms, halvings, strict=True))
    fitting = (p for p in POLYNOMIALS if most <= p.norm_for(a.dtype))
    return _Plan(next(fitting, POLYNOMIALS[-1]), halvings, halved, square)


def _halvings(norm: float, largest: float) -> int:
    """Return how often a matrix is to be halved until its norm is at most ``largest``."""
    return max(0, math.ceil(math.log2(norm / largest))) if norm > largest else 0


def _scaled(matrices: Tensor, exponents: list[int]) -> Tensor:
    """Return matrices times powers of two, which is exact."""
    if not any(exponents):
        return matrices
    powers = [math.ldexp(1.0, n) for n in exponents]
    return matrices * torch.tensor(powers, dtype=matrices.dtype).to(matrices.device)[:, None, None]


def _is_normal(a: Tensor) -> bool:
    """Check whether all matrices are skew-Hermitian, or all are Hermitian."""
    mirrored = a.mH
    return torch.equal(a, -mirrored) or torch.equal(a, mirrored)


def _squared(result: Pair, halvings: list[int]) -> Pair:
    """Square each matrix, and carry its derivative, as often as it was halved."""
    rounds = max(halvings)
    for done in range(rounds):
        active = [i for i, count in enumerate(halvings) if count > done]
        everyone = len(active) == len(halvings)
        given = result if everyone else [part[active] for part in result]
        squared = [torch.empty_like(part) for part in given]
        multiply(given, given, squared, derivative_alone=len(result) > 1 and done == rounds - 1)
        if everyone:
            result = squared
        else:
            for part, new in zip(result, squared, strict=True):
                part[active] = new
    return result
