"""What an evaluation costs per map and size, backward included, and its errors: torch's and ours.

Of matrices one by one, as a compiled graph runs them. Errors are those of value and gradient in
float32 against float64, relative to their norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.process import call
from benchmarks.timing import fastest
from fxparam.lowering.householder import compact_wy

__all__ = ["measure", "rows", "unchanged"]

_Map = Callable[..., Tensor]


def _ours(a: Tensor) -> Tensor:
    return torch.ops.fxparam.matrix_exp(a)


def _skew(n: int, scale: float = 0.1) -> tuple[Tensor, ...]:
    a = torch.randn(n, n) * scale
    return (a - a.mT,)


def _reflectors(m: int, n: int) -> tuple[Tensor, ...]:
    a = torch.randn(m, n) * 0.3
    return a, 2 / (1 + a.tril(-1).square().sum(-2))


def _inputs() -> Iterator[tuple[str, _Map, _Map, tuple[Tensor, ...]]]:
    for n in (16, 32, 64, 128, 256, 512):
        yield "exponential, skew", torch.matrix_exp, _ours, _skew(n)
    for n in (32, 128):
        yield "exponential, small skew", torch.matrix_exp, _ours, _skew(n, 0.002)
    for n in (32, 128):
        yield "exponential", torch.matrix_exp, _ours, (torch.randn(n, n) * 0.1,)
    for shape in ((16, 16), (64, 64), (64, 32), (128, 64), (256, 128), (512, 256)):
        yield "reflectors", torch.orgqr, compact_wy, _reflectors(*shape)


def _step(function: _Map, inputs: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, cotangent)[0]


def _exact(function: _Map) -> _Map:
    """Return a map as torch computes several: its exponential of one matrix may be wrong.

    Source: https://github.com/pytorch/pytorch/issues/196592
    """
    return lambda *inputs: function(*(torch.stack([x, x]) for x in inputs))[0]


def measure() -> list[dict[str, Any]]:
    """Return milliseconds and the errors of value and gradient, for each map and shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for name, theirs, ours, inputs in _inputs():
        cotangent = torch.randn_like(theirs(*inputs))
        exact = _step(_exact(theirs), tuple(x.double() for x in inputs), cotangent.double())
        row: dict[str, Any] = {"map": name, "shape": "x".join(map(str, inputs[0].shape))}
        for who, function in (("torch", theirs), ("ours", ours)):
            pairs = zip(_step(function, inputs, cotangent), exact, strict=True)
            errors = [float((x - y).norm() / y.norm()) for x, y in pairs]
            row[who] = [fastest(partial(_step, function, inputs, cotangent)), *errors]
        found.append(row)
    return found


def _cayley(a: Tensor) -> Tensor:
    skew, one = a - a.mT, torch.eye(len(a))
    return torch.linalg.solve(one + skew, one - skew)


def _polar(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def _by_eigenvalues(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a + a.mT)
    return vectors * values.exp() @ vectors.mT


_UNCHANGED: dict[str, _Map] = {
    "Cayley": _cayley,
    "`qr`": lambda a: torch.linalg.qr(a)[0],
    "`svd`, its two bases": _polar,
    "`eigh`, of a function": _by_eigenvalues,
    "`inv`": lambda a: torch.linalg.inv(a + 8 * torch.eye(len(a))),
    "`cholesky`": lambda a: torch.linalg.cholesky(a @ a.mT + torch.eye(len(a))),
    "spectral norm of given vectors": lambda a: a / (a[0].detach() @ a @ a[1].detach()),
}


def unchanged() -> list[dict[str, Any]]:
    """Return milliseconds of what is not lowered: forward, and with backward, at two sizes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for name, function in _UNCHANGED.items():
        times = []
        for n in (64, 256):
            a, cotangent = torch.randn(n, n) * 0.1, torch.ones(n, n)
            times.append(fastest(partial(function, a)))
            times.append(fastest(partial(_step, function, (a,), cotangent)))
        found.append({"map": name, "unchanged": times})
    return found


def rows(limit: float) -> Iterator[dict[str, Any]]:
    for function in ("measure", "unchanged"):
        found = call(f"benchmarks.maps:{function}", limit)
        yield from found if isinstance(found, list) else [found]
