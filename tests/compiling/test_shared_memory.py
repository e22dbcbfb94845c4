"""Inputs that come to share memory after compilation, in a graph that writes one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam
from tests import helpers


class Model(nn.Module):
    """Writes to one tensor between two evaluations of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.second = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        fxparam.register_parametrization(self.second, "weight", helpers.Counting())
        self.register_buffer("state", torch.ones(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(x)
        with torch.no_grad():
            self.first.weight.mul_(1.5)
            self.state.add_(1)
        return self.second(x) * self.state.sum()

    @property
    def original(self) -> Any:
        return self.second.parametrizations.weight.original


def _tied(model: Model) -> None:
    model.first.weight = model.original


def _viewed(model: Model) -> None:
    model.first.weight = nn.Parameter(model.original.detach().view(9).view(3, 3))


def _same_data(model: Model) -> None:
    model.first.weight.data = model.original.data


def _buffer_too(model: Model) -> None:
    model.state = model.original.data


TIES = [_tied, _viewed, _same_data, _buffer_too]
X = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()  # all models have one forward, whose compilations are limited


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("tie", TIES)
def test_the_graph_is_compiled_anew(tie: Callable[[Model], None], inner: str) -> None:
    model = Model()
    twin, apart = copy.deepcopy(model), copy.deepcopy(model)
    backend = fxparam.backend(inner)
    compiled = torch.compile(twin, backend=backend)

    def step() -> None:
        torch.testing.assert_close(compiled(X), model(X))

    with torch.no_grad():
        step()
        assert helpers.counted(step)[0] == 1 + 2  # the compiled one shares, as nothing is tied
        assert len(backend.reports) == 1
        for each in (model, twin):
            tie(each)
        step()
        assert helpers.counted(step)[0] == 2 + 2
        assert len(backend.reports) == 2
        for each in (model, twin):
            each.load_state_dict(apart.state_dict())
        step()
        assert len(backend.reports) == 2


def test_a_loop_that_writes_has_the_guard_too() -> None:
    class Loop(Model):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.compiler.nested_compile_region(lambda m, x: m(x))(self.second, x)
            self.state.mul_(2)
            return self.second(x)

    model = Loop()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("eager"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
        for each in (model, twin):
            _buffer_too(each)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), model(X))


def test_an_optimizers_steps_recompile_nothing() -> None:
    model = Model()
    backend = fxparam.backend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(X).sum().backward()
        optimizer.step()
    assert len(backend.reports) == 1


def test_what_shares_memory_from_the_start_stays_compiled() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        _buffer_too(each)
    backend = fxparam.backend("eager")
    compiled = torch.compile(twin, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(X), model(X))
    assert len(backend.reports) == 1
