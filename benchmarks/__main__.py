"""Training-step time of an unrolled orthogonal RNN, each way to run it in multiples of the last.

    python -m benchmarks [--steps T] [--rounds N]

Contestants take turns in one run and medians are compared; gradients are checked against eager's
before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Recurrent(nn.Module):
    """``steps`` reads of an orthogonal weight; ``hoisted`` reads it once, before the loop."""

    def __init__(self, steps: int, size: int = 128) -> None:
        super().__init__()
        self.steps, self.hoisted = steps, False
        self.cell = parametrizations.orthogonal(nn.Linear(size, size))

    def forward(self, h: Tensor) -> Tensor:
        if self.hoisted:
            weight = self.cell.weight
            for _ in range(self.steps):
                h = torch.tanh(nn.functional.linear(h, weight, self.cell.bias))
        else:
            for _ in range(self.steps):
                h = torch.tanh(self.cell(h))
        return h


def contestants(model: Recurrent) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Each with parameters of its own, equal to ``model``'s."""
    built: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}
    for name, backend in (
        ("eager", None),
        ("eager, cached()", None),
        ("Inductor", "inductor"),
        ("fxparam", "fxparam"),
        ("hoisted by hand, Inductor", "inductor"),
    ):
        twin = copy.deepcopy(model)
        twin.hoisted = "by hand" in name
        run: Callable[[Tensor], Tensor] = torch.compile(twin, backend=backend) if backend else twin
        if "cached" in name:
            run = parametrize.cached()(twin)
        built[name] = (twin, run)
    return built


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--steps", type=int, default=32, help="steps of the loop")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each contestant")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, x = Recurrent(options.steps), torch.randn(32, 128)
    built = contestants(model)
    for name, (twin, run) in built.items():
        run(x).sum().backward()
        for p, q in zip(twin.parameters(), built["eager"][0].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(options.rounds):
        for name, (_, run) in built.items():
            start = time.perf_counter()
            run(x).sum().backward()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    limit = list(median.values())[-1]
    for name, seconds in median.items():
        print(f"{name:28} {1e3 * seconds:8.1f} ms {seconds / limit:6.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
