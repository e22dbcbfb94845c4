"""What a batch of evaluations costs, against one after the other: by op, size and number.

    python -m benchmarks.batching [OP ...]

For each op and side of its matrices, the time of forward and backward of some matrices one by one,
of their stack, and the ratio. Then the memory at the peak of forward and backward, and of forward
alone, in multiples of the matrix. The table of ``fxparam/graph/passes/batch_gains.py`` is made from
this: one thread, the fastest of many runs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import peak
from benchmarks.timing import fastest
from fxparam.lowering.householder import compact_wy

__all__ = ["OPS", "main", "memory", "times"]

SIDES = (8, 16, 32, 64, 128, 256)
COUNTS = (2, 8, 32)
_ROWS = 2048  # more rows than this in all take long, and show nothing new


def _skew(x: Tensor) -> Tensor:
    return x.tril(-1) - x.tril(-1).mT


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _householder(x: Tensor) -> Tensor:
    a = x.tril(-1)
    return torch.linalg.householder_product(a, 2 / (1 + (a * a).sum(-2)))


def _reflectors(x: Tensor) -> Tensor:
    a = x.tril(-1)
    return compact_wy(a, 2 / (1 + (a * a).sum(-2)))


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "lowered matrix_exp": lambda x: torch.ops.fxparam.matrix_exp(_skew(x)),
    "lowered householder_product": _reflectors,
    "matrix_exp": lambda x: torch.matrix_exp(_skew(x)),
    "householder_product": _householder,
    "solve": lambda x: torch.linalg.solve(_eye(x) - _skew(x), _eye(x) + _skew(x)),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(
        _eye(x) + x.tril(-1), x, upper=False
    ),
    "inv": lambda x: torch.linalg.inv(_eye(x) + _skew(x)),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + _eye(x)),
    "qr": lambda x: torch.linalg.qr(x)[0],
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False)[1],
    "eigh": lambda x: torch.linalg.eigh(x + x.mT)[0],
    "matmul": lambda x: x @ x.mT,
    "pointwise": lambda x: x / x.norm(dim=-1, keepdim=True) + torch.tanh(x),
}


def times(op: Callable[[Tensor], Tensor], side: int, count: int) -> tuple[float, float]:
    """Return the milliseconds of forward and backward one by one, and as a batch."""
    torch.manual_seed(0)
    originals = [(torch.randn(side, side) * 0.1).requires_grad_() for _ in range(count)]
    gradients = [torch.randn_like(op(each)) for each in originals]

    def one_by_one() -> None:
        torch.autograd.grad([op(each) for each in originals], originals, gradients)

    def batched() -> None:
        torch.autograd.grad(torch.unbind(op(torch.stack(originals))), originals, gradients)

    return fastest(one_by_one, 0.5), fastest(batched, 0.5)


def memory(op: Callable[[Tensor], Tensor], side: int = 64, count: int = 16) -> tuple[float, float]:
    """Return the bytes at the peak, with backward and without, in multiples of the matrices."""
    x = (torch.randn(count, side, side) * 0.1).requires_grad_()
    gradient = torch.randn_like(op(x))

    def without() -> None:
        with torch.no_grad():
            op(x)

    both, forward = peak(lambda: torch.autograd.grad(op(x), x, gradient)), peak(without)
    return both / (4 * x.numel()), forward / (4 * x.numel())


def main(names: list[str]) -> None:
    """Print a line for each op and side, and one with the memory of each op."""
    torch.set_num_threads(1)
    for name, side in itertools.product(names or OPS, SIDES):
        found = [
            (count, *times(OPS[name], side, count)) for count in COUNTS if count * side <= _ROWS
        ]
        row = "   ".join(f"{n}: {a:.2f} -> {b:.2f} ms ({b / a:.2f})" for n, a, b in found)
        print(f"{name:28} {side:4}   {row}", flush=True)
    for name in names or OPS:
        both, forward = memory(OPS[name])
        print(f"{name:28} memory {both:.0f}, forward alone {forward:.0f} matrices")


if __name__ == "__main__":
    main(sys.argv[1:])
