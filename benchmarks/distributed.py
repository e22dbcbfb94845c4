"""Step times of one recurrent model on two ranks: alone, and in ``DistributedDataParallel``.

Each rank trains on one thread. The model has orthogonal weights that each of its steps reads. Ways
take turns, and what is printed is the median of each, of the slower rank: the model alone on each
rank plus the reductions of its gradients, and the model in DDP, with several buckets.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import orthogonal

import fxparam
from benchmarks.process import run

__all__ = ["measure", "rows"]


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


def measure(width: int = 256, steps: int = 16, rounds: int = 15) -> dict[str, float]:
    """Return the median seconds of each way, of the slower rank; runs on each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = _ways(width, steps)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round in range(rounds + 2):
        for name, step in ways.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            elapsed = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if round > 1:
                times[name].append(float(elapsed))
    dist.destroy_process_group()
    return {name: statistics.median(found) for name, found in times.items()}


def rows(limit: float) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        problem = run([*ranks, "-m", "benchmarks.distributed", str(output)], limit)
        if problem:
            yield {"error": problem}
            return
        found = json.loads(output.read_text())
    yield from ({"way": name, "step": seconds} for name, seconds in found.items())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    measured = json.dumps(measure())
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(measured)
