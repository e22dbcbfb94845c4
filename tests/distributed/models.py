"""A recurrent network whose weights are parametrized, and how one step of it is looked at."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.profiler import ProfilerActivity, profile

import fxparam
from tests import helpers

__all__ = ["WIDTH", "Half", "Recurrent", "Step", "batch", "model", "one_step", "reference"]

WIDTH = 8


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wx, self.wh = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.wx(x) + self.wh(h))


class Recurrent(nn.Module):
    """Reads each of its two parametrized weights four times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = Cell(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(4):
            h = self.cell(x, h)
        return self.out(h)


class Half(nn.Module):
    """Stores twice of what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return 2 * x


def model(kind: str) -> Recurrent:
    """Equal on all ranks. ``plain``, or with a ``pure`` or ``orthogonal`` weight that counts."""
    torch.manual_seed(0)
    made = Recurrent()
    for layer in (made.cell.wx, made.cell.wh):
        if kind == "orthogonal":
            fxparam.adopt(orthogonal(layer, orthogonal_map="matrix_exp"))
        if kind != "plain":
            fxparam.register_parametrization(layer, "weight", helpers.Counting())
    return made


def batch(rank: int | None = None) -> Tensor:
    """Another one on each rank."""
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 + rank))


def reference(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output on this rank and the mean gradients, computed in eager code by each rank."""
    made, count = model(kind), dist.get_world_size()
    for rank in range(count):
        (made(batch(rank)).square().mean() / count).backward()
    grads = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return made(batch()).detach(), copy.deepcopy(grads)


@dataclass(frozen=True)
class Step:
    """What was seen of one step."""

    evaluations: tuple[int, int]
    collectives: dict[str, int]


def one_step(
    module: nn.Module, run: Callable[[], Any], kind: str, *, check: bool = True, warm: int = 2
) -> Step:
    """Run steps, look at the last, and compare it with eager code on one rank."""
    output: Any = None

    def step() -> None:
        nonlocal output
        module.zero_grad(set_to_none=True)
        output = run()

    for _ in range(warm):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        counts = helpers.counted(step)
    gloo = [e.name for e in profiler.events() if e.name.startswith("gloo:")]
    if check:
        expected, grads = reference(kind)
        torch.testing.assert_close(_whole(output), expected)
        found = {_plain(n): p.grad for n, p in module.named_parameters()}
        # Where the original is what is gathered by a parametrization.
        found |= {
            re.sub(r"parametrizations\.(\w+)\.original$", r"\1", n): g for n, g in found.items()
        }
        for name, grad in grads.items():
            torch.testing.assert_close(_whole(found[name]), grad, msg=lambda m, n=name: f"{n}: {m}")
    names = (name.removeprefix("gloo:") for name in gloo)
    return Step(counts, dict(collections.Counter(names)))


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")
