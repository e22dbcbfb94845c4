"""Reads in traced code that get the value of an earlier evaluation: it is traced once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxparam
import fxparam.compiling.backend as backend_module
from fxparam.graph import hoist
from tests.regions import check

X = torch.randn(3, 3, dtype=torch.float64)
SCALE = 2.0
FLAGS = {"none"}
CONFIG: dict[str, object] = {"shifted": True, "other": 1}


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

    power: int | None = 2
    zero = 0.0

    def forward(self, x: Tensor) -> Tensor:
        value = (x * SCALE * self.factor + self.shift).sin().exp()
        value = value * 2 if "twice" in FLAGS else value
        value = value + 1 if "shifted" in CONFIG else value
        value = -value if "negative" in CONFIG else value
        value = value if self.power is None else value**self.power
        return value + math.copysign(1, self.zero)


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
def test_an_evaluation_is_traced_once(
    body: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(gm: torch.fx.GraphModule, **options: Any) -> Any:
        assert sum(node.target == "sin" for node in gm.graph.nodes) == 1
        return hoist(gm, **options)

    monkeypatch.setattr(backend_module, "hoist", counted)
    model = Model(body)
    twin = copy.deepcopy(model)
    backend = fxparam.backend("eager")
    check(torch.compile(twin, backend=backend, fullgraph=True), twin, model, X)
    for report in backend.reports:
        assert report.merged > 0
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


def _set_changed(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    FLAGS.add("twice")
    z = m.cell(x)
    FLAGS.discard("twice")
    return y + z


def _key_deleted(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    del CONFIG["shifted"]
    z = m.cell(x)
    CONFIG["shifted"] = True
    return y + z


def _key_added(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    CONFIG["negative"] = None
    z = m.cell(x)
    del CONFIG["negative"]
    return y + z


def _class_attribute_hidden(m: Model, x: Tensor) -> Tensor:
    m.cell.parametrizations.weight[0].power = 1
    y = m.cell(x)
    m.cell.parametrizations.weight[0].power = None
    return y + m.cell(x)


def _signed_zero(m: Model, x: Tensor) -> Tensor:
    m.cell.parametrizations.weight[0].zero = 0.0
    y = m.cell(x)
    m.cell.parametrizations.weight[0].zero = -0.0
    return y + m.cell(x)


def _flag_by_position(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    nn.functional.relu(m.alias, True)
    return y.detach() + m.cell(x)


def _written_by_embedding(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    nn.functional.embedding(torch.tensor([0, 1]), m.alias, max_norm=0.1)
    return y.detach() + m.cell(x)


def _written_by_another_out(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    shift = m.cell.parametrizations.weight[0].shift
    torch.ops.aten.max.dim_max(x, 0, max=shift, max_values=torch.zeros(3, dtype=torch.long))
    return y.detach() + m.cell(x)


def _written_under_vmap(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    torch.vmap(lambda row: row.mul_(0.5))(m.alias)
    return y.detach() + m.cell(x)


def _statistics_updated(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    shift = m.cell.parametrizations.weight[0].shift
    torch.batch_norm_update_stats(x, shift, torch.ones_like(shift), 0.1)
    return y + m.cell(x)


@pytest.mark.parametrize(
    "body",
    [
        _set_changed,
        _key_deleted,
        _key_added,
        _class_attribute_hidden,
        _signed_zero,
        _flag_by_position,
        _written_by_embedding,
        _written_by_another_out,
        _written_under_vmap,
        _statistics_updated,
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


def test_a_variable_of_the_code_around() -> None:
    scale = 2.0

    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale

    layer = nn.Linear(3, 3, dtype=torch.float64)
    fxparam.register_parametrization(layer, "weight", Scaling())

    def run(x: Tensor) -> Tensor:
        nonlocal scale
        scale = 2.0
        with fxparam.cached():
            y = layer(x)
            scale = 3.0
            return y + layer(x)

    def plain(x: Tensor) -> Tensor:
        nonlocal scale
        scale = 2.0
        y = layer(x)
        scale = 3.0
        return y + layer(x)  # type: ignore[no-any-return]

    assert_close(torch.compile(run, backend=fxparam.backend("eager"))(X), plain(X))


@pytest.mark.parametrize("states", [[1.0], (1.0,), {"a": 1.0}])
def test_containers_of_tensors_may_be_assigned(states: Any) -> None:
    def keeping(m: Any, x: Tensor) -> Tensor:
        y = m.cell(x)
        m.states = [y, [y]]
        m.states = states
        z = m.cell(x)
        m.states = (y,)
        return y + z + m.cell(x)

    model = Model(keeping)
    model.states = [torch.ones(2)]
    assert_close(torch.compile(model, backend=fxparam.backend("eager"))(X), model(X))
