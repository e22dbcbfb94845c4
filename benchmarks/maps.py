"""What an evaluation costs per map and size, backward included, and its errors: torch's and ours.

    python -m benchmarks.maps

Times are the smallest of some runs, in one process on one thread, in milliseconds: of matrices one
by one, as a compiled graph runs them. Errors are those of value and gradient in float32 against
float64, relative to their norms.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fxparam.lowering.householder import compact_wy

__all__ = ["main"]

_Map = Callable[..., Tensor]
_RUNS = 9


def _exponential(a: Tensor) -> Tensor:
    return torch.ops.fxparam.matrix_exp(a)


def _skew(n: int, scale: float) -> tuple[Tensor, ...]:
    a = torch.randn(n, n) * scale
    return (a - a.mT,)


def _reflectors(m: int, n: int) -> tuple[Tensor, ...]:
    a = torch.randn(m, n) * 0.3
    return a, 2 / (1 + a.tril(-1).square().sum(-2))


def _step(function: _Map, inputs: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, cotangent)[0]


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def _row(name: str, theirs: _Map, ours: _Map, inputs: tuple[Tensor, ...]) -> str:
    cotangent = torch.randn_like(theirs(*inputs))
    exact = _step(_exact(theirs), tuple(x.double() for x in inputs), cotangent.double())
    cells = [f"{name} {'x'.join(map(str, inputs[0].shape))}"]
    for function in (theirs, ours):
        found = _step(function, inputs, cotangent)
        errors = (float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))
        elapsed = _fastest(lambda f=function: _step(f, inputs, cotangent))
        cells += [f"{elapsed:.2f}", *(f"{error:.1e}" for error in errors)]
    return f"| {' | '.join(cells)} |"


def _exact(function: _Map) -> _Map:
    """Return a map as torch computes several: its exponential of one matrix may be wrong.

    Source: https://github.com/pytorch/pytorch/issues/196592
    """
    return lambda *inputs: function(*(torch.stack([x, x]) for x in inputs))[0]


def main() -> None:
    """Print the table of docs/rules.md."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| map | torch | value | gradient | ours | value | gradient |")
    print("|---|---|---|---|---|---|---|")
    for n in (16, 32, 64, 128, 256, 512):
        print(_row("exponential, skew", torch.matrix_exp, _exponential, _skew(n, 0.1)))
    for n in (32, 128):
        print(_row("exponential, small skew", torch.matrix_exp, _exponential, _skew(n, 0.002)))
    for n in (32, 128):
        given = (torch.randn(n, n) * 0.1,)
        print(_row("exponential", torch.matrix_exp, _exponential, given))
    for shape in ((16, 16), (64, 64), (64, 32), (128, 64), (256, 128), (512, 256)):
        print(_row("reflectors", torch.orgqr, compact_wy, _reflectors(*shape)))


if __name__ == "__main__":
    main()
