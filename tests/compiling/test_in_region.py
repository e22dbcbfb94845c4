"""Code compiled with fxparam's backend, run in an eager ``cached()`` region: the region's values.

The graph takes them as inputs, and what the region does not have is evaluated once, in front.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxparam
import fxparam.parametrize as ours
from tests import helpers, regions
from tests.regions import WRAPS, Model


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


X = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)


def _in_a_region(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with fxparam.cached():
            return call(x) + call(2 * x)

    return run


def _once(m: Model, x: Tensor) -> Tensor:
    return m.cell(x)


def _often(m: Model, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(m.cell(x))
    return x


def _in_several_graphs(m: Model, x: Tensor) -> Tensor:
    x = _often(m, x)
    torch._dynamo.graph_break()
    x = _often(m, x)
    torch._dynamo.graph_break()
    return _often(m, x)


def _in_a_checkpoint(m: Model, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.cell(m.cell(x)), x, use_reentrant=False)


def _in_a_scan(m: Model, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return (h := m.cell(h) + row), h.clone()

    return scan(step, x[0].clone(), x)[1]


def _after_its_input_was_computed(m: Model, x: Tensor) -> Tensor:
    y = torch.tanh(x).sum() * m.cell.weight
    return y + m.cell.weight.sum()


def _with_other_random_numbers(m: Model, x: Tensor) -> Tensor:
    return nn.functional.dropout(m.cell(nn.functional.dropout(x, 0.5)), 0.5)


def _buffers_read_around(m: Model, x: Tensor) -> Tensor:
    buffers = list(m.cell.buffers())
    before = sum([b.sum() for b in buffers], x.sum())
    x = m.cell(x) * before
    return x * sum([b.sum() for b in buffers], x.sum())


def _an_original_used_too(m: Model, x: Tensor) -> Tensor:
    return m.cell(x) @ m.cell.parametrizations.weight.original


def _original_written(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x).detach()
    with torch.no_grad():
        m.cell.parametrizations.weight.original.mul_(1.5)
    return m.cell(x) + y


def _original_written_first(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.cell.parametrizations.weight.original.mul_(1.5)
    return m.cell(x)


def _value_written(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    w = m.cell.weight
    with torch.no_grad():
        w.view(-1)[:3].mul_(1.5)
    return m.cell(y)


def _grad_modes(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.cell(x)
    return m.cell(x) + m.cell(y) + y


def _in_eval(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    m.cell.eval()
    y = y + m.cell(x)
    m.cell.train()
    return y + m.cell(x)


def _value_returned(m: Model, x: Tensor) -> Tensor:
    return m.cell.weight


def _its_shape_alone(m: Model, x: Tensor) -> Tensor:
    return x * m.cell.weight.shape[0]


def _evaluated_by_the_user_too(m: Model, x: Tensor) -> Tensor:
    w = m.cell.parametrizations.weight.original
    return torch.matrix_exp(w) @ m.cell(x)


def _a_region_inside(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        x = m.cell(x)
    return m.cell(x)


def _in_autocast(m: Model, x: Tensor) -> Tensor:
    y = m.cell(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = y + (m.cell.weight.float() @ x.float()).double()
    return m.cell(y)


def _other_originals(m: Model, x: Tensor) -> Tensor:
    name = "parametrizations.weight.original"
    swapped = {name: 1.5 * m.cell.parametrizations.weight.original}
    return m.cell(torch.func.functional_call(m.cell, swapped, (x,)))


def _in_a_gradient(m: Model, x: Tensor) -> Tensor:
    return m.cell(x) + torch.func.grad(lambda t: m.cell(t).square().sum())(x)


TRAINED = [
    _once,
    _often,
    _in_several_graphs,
    _in_a_checkpoint,
    _after_its_input_was_computed,
    _with_other_random_numbers,
    _buffers_read_around,
    _an_original_used_too,
    _grad_modes,
    _in_eval,
    _value_returned,
    _evaluated_by_the_user_too,
    _a_region_inside,
    _in_autocast,
    _other_originals,
    _in_a_gradient,
    *regions.BODIES,
]
# Of what was written, eager code can take no gradient.
NOT_TRAINED = [_original_written, _original_written_first, _value_written, _its_shape_alone]
WRITING = {regions.original_written, regions.value_of_a_later_read_written}


def _equal(
    model: nn.Module,
    options: dict[str, Any],
    *,
    drawn: bool = False,
    twin: nn.Module | None = None,
) -> None:
    """Two steps in a region of two calls each: what eager code does."""
    twin = copy.deepcopy(model) if twin is None else twin
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), **options)
    expected = list(regions.steps(model, _in_a_region(model), X))
    actual = list(regions.steps(twin, _in_a_region(compiled), X))
    for a, b in zip(actual, expected, strict=True):
        # The numbers drawn for what is computed are those of the inner backend.
        for i in [-1] if drawn else range(len(b)):
            assert_close(a[i], b[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("body", TRAINED, ids=lambda body: body.__name__)
def test_equals_eager(body: Callable[..., Any], wrap: str) -> None:
    if body is _in_a_checkpoint and wrap in ("spectral norm", "assigning", "random mask"):
        pytest.skip("eager code recomputes other values after the region")
    if body in WRITING:
        pytest.skip("eager code takes no gradient of what was written")
    _equal(Model(wrap, body), {}, drawn=body is _with_other_random_numbers)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("body", [*NOT_TRAINED, *WRITING], ids=lambda body: body.__name__)
def test_equals_eager_in_inference(body: Callable[..., Any], wrap: str) -> None:
    model = Model(wrap, body)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            expected = _in_a_region(model)(X)
            torch.manual_seed(seed)
            assert_close(_in_a_region(compiled)(X), expected, rtol=1e-12, atol=1e-12)
            assert_close(twin.state_dict(), model.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", sorted(WRAPS.keys() - {"assigning"}))
@pytest.mark.parametrize("body", [_once, _often, _buffers_read_around])
def test_the_graph_is_whole(body: Callable[..., Any], wrap: str) -> None:
    if wrap in ("spectral norm", "iterating") and body is _buffers_read_around:
        pytest.skip("what it writes is read before: it is read outside of the graph")
    _equal(Model(wrap, body), {"fullgraph": True})


def test_a_checkpoint_takes_the_value() -> None:
    _equal(Model("pure", _in_a_checkpoint), {"fullgraph": True})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("body", [_once, _often])
def test_a_checkpointed_function_evaluates_as_often_when_it_runs_again(
    body: Callable[..., Any], compiled: bool
) -> None:
    """It runs again after the region, and finds what it had saved by counting."""
    model = Model("pure", body)
    backend = fxparam.backend("aot_eager")
    call = torch.compile(model, backend=backend) if compiled else model

    def step(run: Callable[..., Any]) -> list[Any]:
        model.zero_grad()
        run(lambda x: checkpoint(call, x, use_reentrant=False))(X).sum().backward()
        return [p.grad for p in model.parameters()]

    def inside(call: Callable[..., Any]) -> Callable[..., Any]:
        def segment(x: Tensor) -> Tensor:
            with fxparam.cached():
                return model(model(x))

        return lambda x: model(x) + checkpoint(segment, x, use_reentrant=False)

    plain = step(lambda call: lambda x: call(x) + call(2 * x))
    assert_close(step(_in_a_region), plain)
    plain = step(lambda call: lambda x: model(x) + model(model(x)))
    assert_close(step(inside), plain)
    twice = step(lambda call: lambda x: sum(model(k * x) + model(model(k * x)) for k in (1, 2)))
    assert_close(step(lambda call: _in_a_region(inside(call))), twice)


def _counting(body: Callable[..., Any]) -> Model:
    model = Model("pure", body)
    ours.register_parametrization(model.cell, "weight", helpers.Counting())
    return model


@pytest.mark.parametrize("body", [_once, _often, _in_several_graphs])
def test_one_evaluation_and_one_backward_in_a_region(body: Callable[..., Any]) -> None:
    model = _counting(body)
    run = _in_a_region(torch.compile(model, backend=fxparam.backend("aot_eager")))
    run(X).sum().backward()  # compiles
    assert helpers.counted(lambda: run(X).sum().backward()) == (1, 1)
    with torch.no_grad():
        run(X)
        assert helpers.counted(lambda: run(X)) == (1, 0)


def test_eager_and_compiled_code_share_a_value() -> None:
    model = _counting(_often)
    compiled = torch.compile(model, backend=fxparam.backend("aot_eager"), fullgraph=True)

    def eager_first() -> Tensor:
        with fxparam.cached():
            return model.cell.weight.sum() + compiled(X).sum()

    def compiled_first() -> Tensor:
        with fxparam.cached():
            return compiled(X).sum() + model.cell.weight.sum()

    for run in (eager_first, compiled_first):
        run()
        assert helpers.counted(lambda run=run: run().backward()) == (1, 1)
    with fxparam.cached():
        first = model.cell.weight
        model.body = _value_returned
        assert compiled(X) is first


def test_a_write_between_two_calls_is_seen() -> None:
    model = Model("pure", _often)
    compiled = torch.compile(model, backend=fxparam.backend("aot_eager"), fullgraph=True)
    with fxparam.cached(), torch.no_grad():
        for _ in range(3):
            actual = compiled(X)
            assert_close(actual, model(X))
            model.cell.parametrizations.weight.original.mul_(0.5)
        model.cell.weight.zero_()  # the value
        assert_close(compiled(X), model(X))
        model.cell.parametrizations.weight.original = nn.Parameter(X.clone())
        assert_close(compiled(X), model(X))


class Nested(nn.Module):
    """Reads another parametrized tensor."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cells = [cell]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cells[0].weight


@pytest.mark.parametrize("wrap", ["pure", "spectral norm", "assigning", "random mask"])
def test_parts_that_are_read_by_themselves(wrap: str) -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        return m.other(m.cell(x)) @ m.cell.weight

    def made() -> Model:
        torch.manual_seed(0)
        model = Model(wrap, run)
        model.other = nn.Linear(3, 3, dtype=torch.float64)
        ours.register_parametrization(model.other, "weight", Nested(model.cell))
        return model

    _equal(made(), {}, twin=made())


@pytest.mark.parametrize("kind", [regions.Scheduled, regions.Initialized])
@pytest.mark.parametrize("body", [_once, _often, _in_several_graphs])
def test_evaluations_that_change_attributes(body: Callable[..., Any], kind: Any) -> None:
    model = Model("pure", body)
    ours.remove_parametrizations(model.cell, "weight")
    ours.register_parametrization(model.cell, "weight", kind(), unsafe=True)
    twin = copy.deepcopy(model)
    _equal(model, {}, twin=twin)
    mine, theirs = (vars(m.cell.parametrizations.weight[0]) for m in (twin, model))
    assert mine.get("n") == theirs.get("n")


def test_a_loop_whose_evaluation_moves_out_takes_the_value() -> None:
    helpers.skip_unless_scans_train()
    model = _counting(_in_a_scan)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    # In eager code, torch compiles the body, which the region cannot enter.
    expected = model(X) + model(2 * X)
    assert_close(_in_a_region(compiled)(X), expected)
    assert helpers.counted(lambda: _in_a_region(compiled)(X)) == (1, 0)


def test_values_of_many_tensors_and_of_one_that_is_tied() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(4))
            for i, layer in enumerate(self.layers):
                WRAPS["spectral norm" if i % 2 else "pure"](layer)
            first, third = (self.layers[i].parametrizations.weight for i in (0, 2))
            third.original = first.original

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                for layer in self.layers:
                    x = torch.tanh(layer(x))
            return x

    model = Many()
    _equal(model, {"fullgraph": True})


def test_by_inductor() -> None:
    model = Model("spectral norm", _in_several_graphs)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="fxparam")
    for a, b in zip(
        regions.steps(twin, _in_a_region(compiled), X),
        regions.steps(model, _in_a_region(model), X),
        strict=True,
    ):
        assert_close(a[:-1], b[:-1], rtol=1e-9, atol=1e-9)


def test_a_whole_step_with_micro_batches() -> None:
    model = _counting(_often)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)

    def step(call: Callable[[Tensor], Tensor]) -> None:
        with fxparam.cached():
            sum((linear(call(k * X), X).square().sum() for k in range(1, 4)), X.sum()).backward()

    step(model)
    step(compiled)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(q.grad, p.grad)
    assert helpers.counted(lambda: step(compiled)) == (1, 1)


class Reaching(nn.Module):
    """Reads an attribute, what a list holds, and globals."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.scales = 1.0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale * self.scales[0] * _GLOBALS[0] * _global)


class Difference(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - 2 * b

    def right_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), torch.zeros_like(x)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(3, 3, dtype=torch.float64))
        self.register_buffer("b", 3 * torch.ones(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a


class Enclosed(nn.Module):
    """Reads a variable of the function that made it."""

    def __init__(self) -> None:
        super().__init__()
        scale = 1.0

        def set_to(value: float) -> None:
            nonlocal scale
            scale = value

        self.set_to, self.scaled = set_to, lambda x: x * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


_GLOBALS, _global = [1.0], 1.0


def _attribute(cell: nn.Module, x: Tensor) -> Tensor:
    cell.parametrizations.weight[0].scale = 0.5
    return cell(x)


def _item(cell: nn.Module, x: Tensor) -> Tensor:
    cell.parametrizations.weight[0].scales[0] = 2.5
    return cell(x)


def _item_of_a_global(cell: nn.Module, x: Tensor) -> Tensor:
    _GLOBALS[0] = 3.0
    y = cell(x)
    _GLOBALS[0] = 1.0
    return y


def _a_global(cell: nn.Module, x: Tensor) -> Tensor:
    global _global
    _global = 3.0
    y = cell(x)
    _global = 1.0
    return y


def _exchanged_originals(cell: nn.Module, x: Tensor) -> Tensor:
    own = cell.parametrizations.weight
    exchanged = {
        "parametrizations.weight.original0": own.original1,
        "parametrizations.weight.original1": own.original0,
    }
    return torch.func.functional_call(cell, exchanged, (x,))


def _a_buffer_for_a_while(cell: nn.Module, x: Tensor) -> Tensor:
    own = cell.parametrizations.weight[0]
    before, own.a = own.a, own.a * 10
    y = cell(x)
    own.a = before
    return y


def _exchanged_buffers(cell: nn.Module, x: Tensor) -> Tensor:
    own = cell.parametrizations.weight[0]
    own.a, own.b = own.b, own.a
    return cell(x)


def _exchanged_parametrizations(cell: nn.Module, x: Tensor) -> Tensor:
    own = cell.parametrizations.weight
    own[0], own[1] = own[1], own[0]
    return cell(x)


def _a_variable_of_a_function(cell: nn.Module, x: Tensor) -> Tensor:
    cell.parametrizations.weight[0].set_to(3.0)
    return cell(x)


def _under_a_device(cell: nn.Module, x: Tensor) -> Tensor:
    y = cell(x)
    with torch.device("cpu"):
        return y + cell(x)


def _evaluated_by_itself(cell: nn.Module, x: Tensor) -> Tensor:
    cell.parametrizations.weight()
    return cell(x)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Reaching, _attribute),
        (Reaching, _item),
        (Reaching, _item_of_a_global),
        (Reaching, _a_global),
        (Difference, _exchanged_originals),
        (Buffers, _a_buffer_for_a_while),
        (Buffers, _exchanged_buffers),
        (regions.Assigning, _evaluated_by_itself),
        (regions.Iterating, _under_a_device),
        (Enclosed, _a_variable_of_a_function),
        (Reaching, _exchanged_parametrizations),
    ],
)
def test_what_the_code_changes_before_it_reads_is_seen(
    kind: type[nn.Module], call: Callable[..., Tensor]
) -> None:
    def step(compiled: bool) -> list[Any]:
        torch.manual_seed(0)
        cell = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        ours.register_parametrization(cell, "weight", kind(), unsafe=True)
        if call is _exchanged_parametrizations:
            ours.register_parametrization(cell, "weight", helpers.MatrixExponential())
        backend = fxparam.backend("aot_eager")
        run = torch.compile(call, backend=backend) if compiled else call
        with fxparam.cached():
            y = run(cell, X) + run(cell, 2 * X)
        y.sum().backward()
        return [y.detach(), *(p.grad for p in cell.parameters()), *cell.buffers()]

    assert_close(step(True), step(False))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Itself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_an_original_that_is_the_value_is_the_parameter() -> None:
    def run(cell: nn.Module, x: Tensor) -> Tensor:
        return x @ cell.weight * (1 if cell.weight.is_leaf else 5)

    cell = ours.register_parametrization(nn.Linear(3, 3).double(), "weight", Itself())
    compiled = torch.compile(run, backend=fxparam.backend("aot_eager"), fullgraph=True)
    with fxparam.cached():
        assert_close(compiled(cell, X), run(cell, X))


def test_evaluations_that_a_graph_begins_with() -> None:
    cell = nn.LSTMCell(3, 3, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh"):
        ours.register_parametrization(cell, name, Doubled())
    compiled = torch.compile(cell, backend=fxparam.backend("aot_eager"), fullgraph=True)
    with fxparam.cached():
        assert_close(compiled(X, (X, X)), cell(X, (X, X)))


def test_a_branch_that_cannot_be_left_evaluates() -> None:
    model = _counting(_once)

    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: model(x).tanh(), lambda x: model(x).sin(), (x,))

    compiled = torch.compile(run, backend=fxparam.backend("aot_eager"), fullgraph=True)
    with fxparam.cached():
        assert_close(compiled(X + 1), model(X + 1).tanh())


def test_a_branch_that_writes_to_the_value_is_not_compiled() -> None:
    """It would write to another one: to a value of its own."""
    model = _counting(_once)

    def run(x: Tensor) -> Tensor:
        def write(x: Tensor) -> Tensor:
            model.cell.weight[0] = 0.25
            return x + 0

        w = model.cell.weight.reshape(-1)
        return torch.cond(x.sum() > 0, write, lambda x: x + 0, (x,)) + w.sum()

    compiled = torch.compile(run, backend=fxparam.backend("eager"))
    raises = pytest.raises(torch._dynamo.exc.UncapturedHigherOrderOpError, match="cached")
    with fxparam.cached(), torch.no_grad(), raises:
        compiled(X + 1)


def test_a_checkpoint_whose_original_is_written_after_it_is_left_to_eager_code() -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        y = checkpoint(m.cell, x, use_reentrant=False)
        with torch.no_grad():
            m.cell.parametrizations.weight.original[:, 0].mul_(1.0)
        return y

    model, twin = Model("pure", run), Model("pure", run)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend=fxparam.backend("eager"))
    with fxparam.cached():
        actual, expected = compiled(X), model(X)
    actual.sum().backward()
    expected.sum().backward()
    assert_close(twin.cell.bias.grad, model.cell.bias.grad)


def test_code_that_layers_share_is_not_compiled_for_each() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3, dtype=torch.float64)
            WRAPS["pure"](self.cell)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.cell(x + 0))

    layers = nn.Sequential(*(Block() for _ in range(12)))
    twin, backend = copy.deepcopy(layers), fxparam.backend("aot_eager")
    for layer in twin:
        layer.compile(backend=backend)
    torch._dynamo.utils.counters.clear()
    with fxparam.cached():
        assert_close(twin(X), layers(X))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 7


def test_no_empty_blocks_are_left() -> None:
    graphs: list[torch.fx.GraphModule] = []
    model = Model("spectral norm", _often)
    inner = fxparam.backend(lambda gm, _: graphs.append(gm) or gm)
    with fxparam.cached():
        torch.compile(model, backend=inner)(X)
    gm, evaluation = graphs
    switches = {"op": "call_function", "target": torch._C._set_grad_enabled}
    assert not gm.graph.find_nodes(**switches)
    assert len(evaluation.graph.find_nodes(**switches)) == 2


def test_the_first_graph_that_reads_has_the_evaluation_compiled() -> None:
    evaluations: list[torch.fx.GraphModule] = []

    def record(gm: torch.fx.GraphModule, _: Any) -> Any:
        if any("matrix_exp" in str(node.target) for node in gm.graph.nodes):
            evaluations.append(gm)
        return gm

    layer = fxparam.adopt(orthogonal(nn.Linear(3, 3, dtype=torch.float64)))
    backend = fxparam.backend(record)
    functions = [lambda x: layer(x), lambda x: layer(-x)]
    compiled = [torch.compile(function, backend=backend) for function in functions]
    for _ in range(2):
        with fxparam.cached():
            for run, function in zip(compiled, functions, strict=True):
                assert_close(run(X), function(X))
    assert len(evaluations) == 1
    compiled[0](X)  # outside of the region
    with fxparam.cached():  # with fewer rows: compiled again, and still the first reader
        compiled[0](X[:1])
    assert len(evaluations) == 3


class Root(nn.Module):
    """Has an infinite derivative at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def _layers(*steps: nn.Module) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in steps)
    for layer, step in zip(layers, steps, strict=True):
        ours.register_parametrization(layer, "weight", step)
    return layers


def test_evaluations_without_effects_are_compiled_as_one() -> None:
    exponential = helpers.MatrixExponential
    layers = _layers(*(exponential() for _ in range(5)))
    layers.insert(2, fxparam.adopt(nn.utils.parametrizations.spectral_norm(layers.pop(2))))
    twin = copy.deepcopy(layers)
    evaluations = []

    def record(gm: torch.fx.GraphModule, _: Any) -> Any:
        targets = [str(node.target) for node in gm.graph.nodes]
        if not any("linear" in target for target in targets):
            evaluations.append(sum("matrix_exp" in target for target in targets))
        return gm

    def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers:
            x = torch.tanh(layer(x))
        return x

    compiled = torch.compile(forward, backend=fxparam.backend(record, lower=False))
    for _ in range(2):
        for run, m in ((compiled, twin), (forward, layers)):
            with fxparam.cached():
                (run(m, X) + run(m, 2 * X)).square().sum().backward()
        with torch.no_grad():  # one value is stale, then most are
            twin[0].parametrizations.weight.original.mul_(2)
            layers[0].parametrizations.weight.original.mul_(2)
    for a, b in zip(twin.parameters(), layers.parameters(), strict=True):
        assert_close(a.grad, b.grad)
    # The power iteration has an effect, and stands between.
    assert evaluations == [2, 1, 2]


@pytest.mark.parametrize("scope", [fxparam.cached, fxparam.accumulate])
@pytest.mark.parametrize("stale", [0, 1, 2])
def test_few_stale_values_of_many(scope: Any, stale: int) -> None:
    layers = _layers(*(helpers.Counting() for _ in range(3)))
    compiled = torch.compile(
        lambda x: torch.stack([layer(x) for layer in layers]), backend=fxparam.backend("aot_eager")
    )
    for _ in range(2):
        with torch.no_grad(), scope(layers):
            compiled(X)
            before = [layer.weight for layer in layers]
            for layer in layers[:stale]:
                layer.parametrizations.weight.original.mul_(2)
            with fxparam.disabled(layers):
                expected = torch.stack([layer(X) for layer in layers])
            assert_close(compiled(X), expected)
            after = [layer.weight for layer in layers]
            assert [a is b for a, b in zip(before, after, strict=True)] == [
                i >= stale for i in range(3)
            ]


@pytest.mark.parametrize("scope", [fxparam.cached, fxparam.accumulate])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_values_that_are_computed_together_have_gradients_apart(scope: Any, backend: str) -> None:
    layers, ones = _layers(Root(), Root()), torch.ones(3, 3, dtype=torch.float64)
    with torch.no_grad():
        for layer in layers:
            layer.parametrizations.weight.original.zero_()
    twin = copy.deepcopy(layers)

    def both(layers: nn.ModuleList) -> Tensor:
        return layers[0](ones) + layers[1](ones)

    def second(layers: nn.ModuleList) -> Tensor:
        return layers[1].weight + 1

    compiled = [
        torch.compile(f, backend=fxparam.backend(backend), fullgraph=True) for f in (both, second)
    ]
    for m, (first, last) in ((twin, compiled), (layers, (both, second))):
        with scope(m):
            first(m)  # without a gradient
            last(m).sum().backward()
    names = [name for name, p in layers.named_parameters() if p.grad is not None]
    assert names == ["1.parametrizations.weight.original"]
    assert names == [name for name, p in twin.named_parameters() if p.grad is not None]
    mine, eager = (m[1].parametrizations.weight.original.grad for m in (twin, layers))
    assert_close(mine, eager, equal_nan=True)


@pytest.mark.parametrize("scope", [fxparam.cached, fxparam.accumulate])
@pytest.mark.parametrize("grad", [True, False])
def test_evaluations_in_a_scope_are_batched(scope: Any, grad: bool) -> None:
    def layers() -> nn.ModuleList:
        torch.manual_seed(0)
        made = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)]
        return nn.ModuleList(map(orthogonal, made))

    def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers[1:]:  # a new ModuleList, which torch logs in the graph
            x = torch.tanh(layer(x))
        return x

    backend = fxparam.backend("aot_eager")
    first, second, values = layers(), layers(), list[Tensor]()
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    for run, m in ((forward, first), (compiled, second)):
        with torch.set_grad_enabled(grad), scope(m):
            y = run(m, X)
            y = y + run(m, y) + m[0].weight + m[1].weight
            assert m[1].weight.untyped_storage().nbytes() == m[1].weight.nbytes
            if y.requires_grad:
                y.sum().backward()
            values.append(y)
    assert_close(*values)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert_close(a.grad, b.grad)
    assert [len(batch.names) for batch in backend.reports[0].batches] == [3]


def test_a_value_of_a_batch_without_a_gradient() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(orthogonal(nn.Linear(3, 3, dtype=torch.float64)) for _ in range(3))
    backend = fxparam.backend("aot_eager")
    compiled = torch.compile(lambda: torch.stack([m.weight for m in layers]), backend=backend)
    with fxparam.cached(layers):
        compiled()
        layers[1].weight.sum().backward()
    assert len(backend.reports[0].batches[0].names) == 3
    given = [m.parametrizations.weight.original.grad is not None for m in layers]
    assert given == [False, True, False]


@pytest.mark.parametrize("scope", [fxparam.cached, fxparam.accumulate])
@pytest.mark.parametrize("batch", [True, False])
def test_a_value_that_was_held_before_the_others_were_computed(scope: Any, batch: bool) -> None:
    layers = _layers(Root(), Root(), Root())
    with torch.no_grad():
        layers[2].parametrizations.weight.original.zero_()  # where the derivative is infinite
    backend = fxparam.backend("aot_eager", batch=batch)
    compiled = torch.compile(lambda: torch.stack([m.weight for m in layers]), backend=backend)
    with scope(layers):
        layers[2].weight  # noqa: B018  # now the region has it
        compiled()  # computes all three, and gives two to the region
        (layers[0].weight.sum() + layers[1].weight.sum()).backward()
    given = [m.parametrizations.weight.original.grad is not None for m in layers]
    assert given == [True, True, False]


@pytest.mark.parametrize("after", [False, True])
def test_a_value_that_is_a_view_of_what_another_graph_has_made(after: bool) -> None:
    class Transposed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mT

    layers = _layers(Transposed(), Transposed())
    z = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    made = torch.compile(lambda z: (z.sin(), z.cos()), backend="aot_eager")(z)
    for layer, original in zip(layers, made, strict=True):
        del layer.parametrizations.weight.original
        layer.parametrizations.weight.original = original.neg() if after else original
    compiled = torch.compile(lambda: layers[1](layers[0](X)), backend=fxparam.backend("aot_eager"))
    with fxparam.cached(layers):
        compiled()
        layers[0].weight.sum().backward()
    assert_close(z.grad, torch.ones_like(z).cos() * (-1 if after else 1))


@pytest.mark.parametrize("written", ["original", "buffer"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_write_to_what_one_of_several_evaluations_saved(written: str, backend: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("by", torch.full((3, 3), 2.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * x * self.by

    layers = _layers(Scaled(), Scaled(), Scaled())
    twin = copy.deepcopy(layers)

    def forward(layers: nn.ModuleList) -> Tensor:
        x = X
        for layer in layers:
            x = torch.tanh(layer(x))
        return x

    compiled = torch.compile(forward, backend=fxparam.backend(backend))
    for run, m in ((compiled, twin), (forward, layers)):
        with fxparam.cached(m):
            run(m)
            chain = m[0].parametrizations.weight
            with torch.no_grad():
                (chain.original if written == "original" else chain[0].by).mul_(2)
            # Eager code reads a value of which nothing was written.
            (m[1].weight.sum() + run(m).sum()).backward()
    for a, b in zip(twin.parameters(), layers.parameters(), strict=True):
        assert_close(a.grad, b.grad)


def test_hooks_see_gradients_alone() -> None:
    layers, seen = _layers(helpers.Counting(), helpers.Counting()), []
    for name, p in layers.named_parameters():
        p.register_hook(lambda gradient, name=name: seen.append((name, gradient is None)))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(("after", p.grad is None)))
    compiled = torch.compile(
        lambda: layers[1](layers[0](X)), backend=fxparam.backend("aot_eager"), fullgraph=True
    )
    for scope in (fxparam.accumulate, fxparam.cached):
        seen.clear()
        with scope(layers):
            compiled().sum().backward()
        names = sorted(name for name, _ in layers.named_parameters())
        assert sorted(name for name, _ in seen if name != "after") == names
        assert len(seen) == 2 * len(names)
        assert not any(missing for _, missing in seen)
