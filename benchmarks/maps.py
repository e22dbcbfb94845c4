"""What an evaluation costs per map and size, backward included, and its errors: torch's and ours.

    python -m benchmarks.maps [--plot IMAGE]

Times are the smallest of some runs, in one process on one thread, in milliseconds: of matrices one
by one, as a compiled graph runs them. Errors are those of value and gradient in float32 against
float64, relative to their norms. A second table has what is left as it is: forward, and with
backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fxparam.lowering.householder import compact_wy

__all__ = ["main"]

_Map = Callable[..., Tensor]


class _Figures(NamedTuple):
    milliseconds: float
    value: float
    gradient: float

    def __str__(self) -> str:
        return f"{self.milliseconds:.2f} | {self.value:.1e} | {self.gradient:.1e}"


class _Row(NamedTuple):
    name: str
    shape: tuple[int, ...]
    torch: _Figures
    ours: _Figures

    def __str__(self) -> str:
        return f"| {self.name} {'x'.join(map(str, self.shape))} | {self.torch} | {self.ours} |"


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


def _measured(name: str, theirs: _Map, ours: _Map, inputs: tuple[Tensor, ...]) -> _Row:
    cotangent = torch.randn_like(theirs(*inputs))
    exact = _step(_exact(theirs), tuple(x.double() for x in inputs), cotangent.double())
    figures = []
    for function in (theirs, ours):
        found = _step(function, inputs, cotangent)
        errors = (float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))
        elapsed = _fastest(partial(_step, function, inputs, cotangent))
        figures.append(_Figures(elapsed, *errors))
    return _Row(name, tuple(inputs[0].shape), *figures)


def _exact(function: _Map) -> _Map:
    """Return a map as torch computes several: its exponential of one matrix may be wrong.

    Source: https://github.com/pytorch/pytorch/issues/196592
    """
    return lambda *inputs: function(*(torch.stack([x, x]) for x in inputs))[0]


def _rows() -> Iterator[_Row]:
    for n in (16, 32, 64, 128, 256, 512):
        yield _measured("exponential, skew", torch.matrix_exp, _exponential, _skew(n, 0.1))
    for n in (32, 128):
        yield _measured("exponential, small skew", torch.matrix_exp, _exponential, _skew(n, 0.002))
    for n in (32, 128):
        given = (torch.randn(n, n) * 0.1,)
        yield _measured("exponential", torch.matrix_exp, _exponential, given)
    for shape in ((16, 16), (64, 64), (64, 32), (128, 64), (256, 128), (512, 256)):
        yield _measured("reflectors", torch.orgqr, compact_wy, _reflectors(*shape))


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


def _print_unchanged() -> None:
    print("\n| map | forward, 64x64 | and backward | forward, 256x256 | and backward |")
    print("|---|---|---|---|---|")
    for name, function in _UNCHANGED.items():
        cells = [name]
        for n in (64, 256):
            a = torch.randn(n, n) * 0.1
            cells.append(f"{_fastest(partial(function, a)):.2f}")
            cells.append(f"{_fastest(partial(_step, function, (a,), torch.ones(n, n))):.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def _draw(rows: list[_Row], path: Path) -> None:
    """Draw cost and error against size, a column for each map of which more sizes were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_map = {row.name: [r for r in rows if r.name == row.name] for row in rows}
    maps = {name: found for name, found in by_map.items() if len(found) > 2}
    figure, axes = pyplot.subplots(2, len(maps), squeeze=False, figsize=(5 * len(maps), 7))
    for column, (name, found) in zip(axes.T, maps.items(), strict=True):
        sizes = ["x".join(map(str, row.shape)) for row in found]
        for who, color in (("torch", "tab:orange"), ("ours", "tab:blue")):
            figures = [getattr(row, who) for row in found]
            column[0].plot(sizes, [f.milliseconds for f in figures], "o-", color=color, label=who)
            column[1].plot(sizes, [f.value for f in figures], "o--", color=color)
            column[1].plot(sizes, [f.gradient for f in figures], "o-", color=color)
        column[0].set(title=name, yscale="log", ylabel="forward and backward, ms")
        column[1].set(yscale="log", ylabel="relative error: value (dashed), gradient")
        column[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of docs/rules.md; draw it where ``--plot`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maps")
    parser.add_argument("--plot", type=Path, help="an image to draw; needs matplotlib")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| map | torch | value | gradient | ours | value | gradient |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for row in _rows():
        rows.append(row)
        print(row, flush=True)
    _print_unchanged()
    if options.plot:
        _draw(rows, options.plot)


if __name__ == "__main__":
    main()
