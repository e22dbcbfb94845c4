"""``compile(scope="call")``: one evaluation and one backward in each call of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxparam
from tests import helpers


class _Model(nn.Module):
    """Two layers, of which a program may read what it likes."""

    def __init__(self, program: Callable[[Any, Tensor], Tensor], wrap: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.other = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        for layer in (self.cell, self.other):
            if wrap is not None:
                wrap(layer)
            nn.utils.parametrize.register_parametrization(layer, "weight", helpers.Counting())
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self, x)


def _graphs(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.tanh(m.cell(x))
    torch._dynamo.graph_break()
    for _ in range(2):
        x = torch.tanh(m.cell(m.other(x)))
    torch._dynamo.graph_break()
    return m.cell(x)


@torch.compiler.disable
def _eagerly(m: Any, x: Tensor) -> Tensor:
    return m.other(m.cell(x))


def _eager_part(m: Any, x: Tensor) -> Tensor:
    return m.cell(m.other(_eagerly(m, m.cell(x))))


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    def body(x: Tensor) -> Tensor:
        return m.other(m.cell(torch.tanh(m.cell(x))))

    x = checkpoint(body, x, use_reentrant=False)
    torch._dynamo.graph_break()
    return m.other(checkpoint(body, x, use_reentrant=False))


def _loop(m: Any, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.cell(h) @ m.other.weight + row)
        return h, h.sum()

    rows = torch.stack([x, x, x])
    h, ys = torch._higher_order_ops.scan(step, x, rows)
    torch._dynamo.graph_break()
    return m.cell(h) + ys.sum()


PROGRAMS = [_graphs, _eager_part, _checkpointed, _loop]


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_evaluation_and_one_backward(program: Callable[[Any, Tensor], Tensor]) -> None:
    if program is _loop:
        helpers.skip_unless_scans_train()
    model = _Model(program)
    twin = copy.deepcopy(model)
    run = fxparam.compile(model, scope="call", backend=fxparam.backend("aot_eager"))
    x = torch.randn(3, 4, dtype=torch.float64)
    for step in range(3):

        def train() -> None:
            y = run(x)
            assert_close(y, expected)  # noqa: B023
            y.square().sum().backward()

        expected = twin(x)
        expected.square().sum().backward()
        counts = helpers.counted(train)
        assert step == 0 or counts == (2, 2)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad)
            with torch.no_grad():
                for each in (p, q):
                    if each.grad is not None:
                        each -= 0.1 * each.grad
                    each.grad = None


def test_no_graph_is_compiled_anew() -> None:
    graphs: list[Any] = []

    def record(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    model = _Model(_graphs)
    run = fxparam.compile(model, scope="call", backend=fxparam.backend(record))
    x = torch.randn(3, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = set()
    for step in range(40):
        with torch.set_grad_enabled(step % 20 < 10):
            y = run(x)
        if y.requires_grad:
            y.sum().backward()
            optimizer.step()
        if step >= 11:
            compiled.add(len(graphs))
    assert len(compiled) == 1


def test_effects_occur_once_a_call() -> None:
    model = _Model(_graphs, spectral_norm)
    twin = copy.deepcopy(model)
    run = fxparam.compile(model, scope="call", backend=fxparam.backend("aot_eager"))
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(3):
        y = run(x)
        with fxparam.cached(twin):
            assert_close(y, twin(x))
        for b, c in zip(model.buffers(), twin.buffers(), strict=True):
            assert_close(b, c)


def test_what_a_call_does_not_read_is_not_evaluated() -> None:
    model = _Model(lambda m, x: m.cell(m.cell(x)))
    run = fxparam.compile(model, scope="call", backend=fxparam.backend("eager"))
    x = torch.randn(3, 4, dtype=torch.float64)
    run(x)
    assert helpers.counted(lambda: run(x))[0] == 1


def test_a_compiled_cell_in_an_eager_loop() -> None:
    cell = fxparam.register_parametrization(
        nn.Linear(4, 4, dtype=torch.float64), "weight", helpers.Counting()
    )
    twin = copy.deepcopy(cell)
    graphs: list[Any] = []

    def record(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    run = torch.compile(lambda x, h: torch.tanh(cell(h) + x), backend=fxparam.backend(record))
    xs = torch.randn(6, 2, 4, dtype=torch.float64)
    for _ in range(3):

        def train() -> None:
            with fxparam.cached(cell):
                h = xs[0]
                for x in xs:
                    h = run(x, h)
                h.sum().backward()

        assert helpers.counted(train) == (1, 1)
        h = xs[0]
        for x in xs:
            h = torch.tanh(twin(h) + x)
        h.sum().backward()
        for p, q in zip(cell.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad)
            with torch.no_grad():
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
    assert len(graphs) == 4  # two, since h has no gradient at first, and the evaluation for each


def _yields(x: Tensor) -> Any:
    yield x


def test_functions_methods_and_decorators() -> None:
    layer = orthogonal(nn.Linear(3, 3))
    backend = fxparam.backend("eager")
    x = torch.ones(2, 3)

    @fxparam.compile(scope="call", models=[layer], backend=backend)
    def twice(x: Tensor) -> Tensor:
        first = layer.weight
        torch._dynamo.graph_break()
        return layer(x) + (layer.weight - first).sum()

    fxparam.register_parametrization(layer, "weight", nn.Dropout(0.5))
    torch.manual_seed(0)
    y = twice(x)
    torch.manual_seed(0)
    assert_close(y, layer(x))
    fxparam.remove_parametrizations(layer, "weight")
    run = fxparam.compile(layer.forward, scope="call", backend=backend)
    assert_close(run(x), layer(x))
    with pytest.raises(TypeError, match=r"scope='call'.*\n.*models="):
        fxparam.compile(lambda x: layer(x), scope="call")
    with pytest.raises(ValueError, match="'graph', 'call', 'frozen': got 'forever'"):
        fxparam.compile(layer, scope="forever")
    with pytest.raises(ValueError, match="got list"):
        fxparam.compile(layer, scope=["call"])
    with pytest.raises(TypeError, match="a generator cannot have"):
        fxparam.compile(_yields, scope="call", models=layer)


def test_a_scope_inside_of_another() -> None:
    model = _Model(_graphs)
    run = fxparam.compile(model, scope="call", backend=fxparam.backend("aot_eager"))
    x = torch.randn(3, 4, dtype=torch.float64)
    run(x)
    with fxparam.cached():
        run(x)
        assert helpers.counted(lambda: run(x)) == (0, 0)
    twin = copy.deepcopy(model)

    def accumulated() -> None:
        with fxparam.accumulate(model):
            for _ in range(3):
                run(x).sum().backward()

    accumulated()
    assert helpers.counted(accumulated) == (2, 2)
    for _ in range(6):
        twin(x).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_an_error_ends_the_call() -> None:
    def fails(m: Any, x: Tensor) -> Tensor:
        y = m.cell(x)
        torch._dynamo.graph_break()
        raise ArithmeticError(y)

    model = _Model(fails)
    run = fxparam.compile(model, scope="call", backend=fxparam.backend("eager"))
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            run(x)
        assert model.cell.weight is not model.cell.weight


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_that_is_called_twice(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(4, 4, dtype=torch.float64)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        fxparam.register_parametrization(layer, name, helpers.Counting())
    twin = copy.deepcopy(layer)
    run = fxparam.compile(_Twice(layer), scope="call", backend=fxparam.backend("aot_eager"))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    for _ in range(2):
        y, expected = run(x), _Twice(twin)(x)
        assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad)


class _Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)[0])[0]
