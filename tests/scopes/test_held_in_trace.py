"""Reads in traced code that get the value of an earlier evaluation: it is traced once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxparam
from tests.regions import check

X = torch.randn(3, 3, dtype=torch.float64)
SCALE = 2.0


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Scaled(nn.Module):
    """Depends on a global number, a number of its own and a tensor in an object that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.register_buffer("shift", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * SCALE * self.factor + self.shift).sin().exp()


class Model(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3, dtype=torch.float64)
        fxparam.register_parametrization(self.cell, "weight", Scaled())
        self.body = body
        self.calls = 0
        self.alias = self.cell.parametrizations.weight.original.data

    def forward(self, x: Tensor) -> Tensor:
        with fxparam.cached():
            return self.body(self, x)


def _loop(m: Model, x: Tensor) -> Tensor:
    for _ in range(4):
        x = m.cell(x)
        x.mul_(0.5)
    rows = torch.zeros_like(x)
    rows[0] = x[0] @ m.cell.weight
    return rows + m.cell(x)


def _values_of_two(m: Model, x: Tensor) -> Tensor:
    return m.cell(m.cell(x)) @ m.cell.weight.t()


@pytest.mark.parametrize("body", [_loop, _values_of_two])
def test_an_evaluation_is_traced_once(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = Model(body)
    twin = copy.deepcopy(model)
    backend = fxparam.backend("eager")
    check(torch.compile(twin, backend=backend, fullgraph=True), twin, model, X)
    for report in backend.reports:
        assert report.merged == 0
        (entry,) = (e for e in report.entries if e.name.endswith("cell.weight"))
        assert (entry.accesses, entry.evaluations) == ((6, 1) if body is _loop else (3, 1))
        assert (entry.runs_before, entry.runs) == (entry.accesses, 1)


def _global_changed(m: Model, x: Tensor) -> Tensor:
    global SCALE
    SCALE = 2.0
    y = m.cell(x)
    SCALE = 3.0
    return y + m.cell(x)


def _number_changed(m: Model, x: Tensor) -> Tensor:
    m.cell.parametrizations.weight[0].factor = 1.0
    y = m.cell(x)
    m.cell.parametrizations.weight[0].factor = 1.5
    return y + m.cell(x)


def _written_through_data(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    m.cell.parametrizations.weight.original.data.mul_(0.9)
    return y.detach() + m.cell(x)


def _written_through_an_alias(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    m.alias.mul_(0.9)
    return y.detach() + m.cell(x)


def _written_through_a_view(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    m.cell.parametrizations.weight[0].shift.view(3, 1)[1].add_(0.5)
    return y + m.cell(x)


def _written_by_several(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    torch._foreach_add_([m.cell.parametrizations.weight[0].shift], 0.5)
    return y + m.cell(x)


def _buffer_assigned(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    m.cell.parametrizations.weight[0].shift = m.cell.parametrizations.weight[0].shift + 0.5
    return y + m.cell(x)


def _running_statistics(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    shift = m.cell.parametrizations.weight[0].shift
    z = nn.functional.batch_norm(x, shift, torch.ones_like(shift), training=True)
    return y + z + m.cell(x)


@pytest.mark.parametrize(
    "body",
    [
        _global_changed,
        _number_changed,
        _written_through_data,
        _written_through_an_alias,
        _written_through_a_view,
        _written_by_several,
        _buffer_assigned,
        _running_statistics,
    ],
    ids=lambda body: body.__name__,
)
def test_what_changed_is_evaluated_anew(body: Callable[[Any, Tensor], Tensor]) -> None:
    """As it is without a region, whose eager form sees no change of numbers and ``data``."""
    model = Model(body)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.alias = each.cell.parametrizations.weight.original.data
    fx = torch.compile(twin, backend=fxparam.backend("eager"), fullgraph=True)
    for _ in range(2):
        assert_close(fx(X), body(model, X), rtol=1e-12, atol=1e-12)
    for name, buffer in model.state_dict().items():
        assert_close(twin.state_dict()[name], buffer)


def test_an_evaluation_that_begins_in_another_and_fails() -> None:
    """The other one is held by all that it reads, from its own beginning."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = [inner]
            self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.scale.exp()
            try:
                return y * self.inner[0].weight  # type: ignore[operator]
            except KeyError:
                return y.sin()

    inner = nn.Linear(3, 3, dtype=torch.float64)
    fxparam.register_parametrization(inner, "weight", Failing(), unsafe=True)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    fxparam.register_parametrization(layer, "weight", Outer(inner))
    start = layer.parametrizations.weight[0].scale.clone()

    def run(x: Tensor) -> Tensor:
        with fxparam.cached():
            y = layer(x)
            layer.parametrizations.weight[0].scale.add_(0.5)
            return y + layer(x)

    expected = run(X)
    layer.parametrizations.weight[0].scale.copy_(start)
    assert_close(torch.compile(run, backend=fxparam.backend("eager"))(X), expected)
