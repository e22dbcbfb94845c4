"""Step times of one recurrent model on two ranks: alone, and in ``DistributedDataParallel``.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.distributed

Each rank trains on one thread. The model has orthogonal weights that each of its steps reads. Ways
take turns, and what is printed is the median of each, of the slower rank: the model alone on each
rank plus the reductions of its gradients, and the model in DDP, with several buckets.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import orthogonal

import fxparam

__all__ = ["main"]


class Recurrent(nn.Module):
    """Reads two orthogonal weights in each step."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.wx, self.wh = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 8 * width)  # more than one bucket
        for layer in (self.wx, self.wh):
            orthogonal(layer, orthogonal_map="matrix_exp")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(self.steps):
            h = torch.tanh(self.wx(x) + self.wh(h))
        return self.out(h)


def _step(model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    model(x).square().mean().backward()


def _reduce(module: nn.Module) -> None:
    for p in module.parameters():
        dist.all_reduce(p.grad)


def _ways(width: int, steps: int) -> dict[str, Callable[[], None]]:
    x = torch.randn(16, width)

    def made() -> Recurrent:
        torch.manual_seed(0)
        return Recurrent(width, steps)

    def alone(backend: str) -> Callable[[], None]:
        module = made()
        compiled = torch.compile(module, backend=backend)

        def run() -> None:
            _step(compiled, module, x)
            _reduce(module)

        return run

    def parallel(backend: object) -> Callable[[], None]:
        ddp = DistributedDataParallel(made(), bucket_cap_mb=1)
        compiled = torch.compile(ddp, backend=backend)  # type: ignore[call-overload]
        return lambda: _step(compiled, ddp, x)

    return {
        "fxparam, alone and reduced": alone("fxparam"),
        "fxparam, DDP": parallel(fxparam.backend()),
        "Inductor, DDP": parallel("inductor"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the medians of each way, in milliseconds and as multiples of the first."""
    parser = argparse.ArgumentParser(prog="-m benchmarks.distributed")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = _ways(options.width, options.steps)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round in range(options.rounds + 2):
        for name, run in ways.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            elapsed = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if round > 1:
                times[name].append(float(elapsed))
    if dist.get_rank() == 0:
        first = statistics.median(times["fxparam, alone and reduced"])
        for name, found in times.items():
            median = statistics.median(found)
            print(f"| {name} | {median * 1e3:.1f} ms | {median / first:.2f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
