"""Functional collectives are pure, and waiting for one is an alias; the others write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxparam

funcol = pytest.importorskip("torch.distributed._functional_collectives")


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    dist.destroy_process_group()


class Gathered(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return funcol.all_gather_tensor(self._parameters["weight"], 0, dist.group.WORLD)

    @property
    def bias(self) -> Tensor:
        return funcol.all_gather_tensor(self._parameters["bias"], 0, dist.group.WORLD)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 2)
        self.cell.__class__ = Gathered

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


class Reduced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matrix_exp(self.b) @ x
        dist.all_reduce(self.b)
        return torch.matrix_exp(self.b) @ y


def _calls(gm: torch.fx.GraphModule, name: str) -> int:
    return sum(name in str(n.target) for n in gm.graph.nodes)


@pytest.mark.parametrize("train", [True, False])
def test_each_parameter_is_gathered_once(train: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(gm)
        return gm

    with torch.set_grad_enabled(train):
        torch.compile(Loop(), backend=fxparam.backend(keep))(torch.randn(2, 4))
    assert _calls(graphs[0], "all_gather_into_tensor") == 2


def test_a_reduction_in_place_is_a_write() -> None:
    fx = fxparam.backend("eager")
    torch.compile(Reduced(), backend=fx)(torch.randn(3, 3))
    assert fx.last_report is not None and fx.last_report.merged == 0
