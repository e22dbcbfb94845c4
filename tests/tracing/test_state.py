"""Tracing models that write: buffers bound anew, operators in place, constants, attributes."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import fxparam
from tests import helpers

X = torch.randn(2, 3, dtype=torch.float64)
captured = pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])


class Model(nn.Module):
    """A cell and some state; what a call does is one of the functions below."""

    def __init__(self, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.cell = weight_norm(nn.Linear(3, 3, dtype=torch.float64))
        self.register_buffer("h", torch.zeros(2, 3, dtype=torch.float64))
        self.register_buffer("g", torch.ones(2, 3, dtype=torch.float64).view(2, 3))
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.zeros(2, 3, dtype=torch.float64)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def _traced(model: nn.Module, example: bool) -> torch.fx.GraphModule:
    return fxparam.symbolic_trace(model, example_inputs=(X,) if example else None)


def _steps(run: nn.Module) -> Any:
    """What three training steps return and leave behind."""
    left: list[Any] = []
    for i in range(3):
        torch.manual_seed(i)
        x = X * (i + 1)
        out = run(x)
        run.zero_grad()
        first = out[0] if isinstance(out, tuple) else out
        first.square().sum().backward(retain_graph=True)
        buffers = [run.get_buffer(name).detach().clone() for name in ("h", "g", "count")]
        left.append((out, x, [p.grad for p in run.parameters()], buffers))
    return left


def _old_value(m: Any, x: Tensor) -> Any:
    old = m.h
    m.h = torch.tanh(m.cell(x) + old)
    return m.cell(x), old


def _saved(m: Any, x: Tensor) -> Any:
    y = m.cell(x) * m.g
    m.g = m.g * 0.9
    return y


def _reset(m: Any, x: Tensor) -> Any:
    m.h = torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(3):
        m.h = torch.tanh(m.cell(x) + m.h)
    return m.h * 1


def _reset_and_written(m: Any, x: Tensor) -> Any:
    m.h = torch.zeros(2, 3, dtype=torch.float64)
    m.h += m.cell(x)
    return m.h * 2


def _written_only(m: Any, x: Tensor) -> Any:
    m.h = m.cell(x).detach() * 2
    return m.cell(x)


def _carried(m: Any, x: Tensor) -> Any:
    m.h = torch.tanh(m.cell(x) + m.h)
    return m.h * 1


def _carried_detached(m: Any, x: Tensor) -> Any:
    m.h = torch.tanh(m.cell(x) + m.h.detach())
    return m.h * 1


def _exchanged(m: Any, x: Tensor) -> Any:
    m.h, m.g = m.g, m.h + m.cell(x)
    return m.cell(x) + m.h


def _in_place_and_anew(m: Any, x: Tensor) -> Any:
    m.count += 1
    m.count = m.count * 2
    return m.cell(x) * m.count


def _in_place(m: Any, x: Tensor) -> Any:
    old = m.count
    m.count += 1
    return m.cell(x) * old


def _local_name(m: Any, x: Tensor) -> Any:
    h = m.h
    with torch.no_grad():
        h += x
    return m.cell(x) * h.clone()


def _out(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        torch.add(m.h, x, out=m.h)
    return m.cell(x) * m.h.clone()


def _input(m: Any, x: Tensor) -> Any:
    x += 1
    return m.cell(x)


def _attribute_and_item(m: Any, x: Tensor) -> Any:
    y = m.cell(x) * 1
    z = y.mT
    z *= 2
    y[:, 0] = x[:, 1]
    return y


def _numbers(m: Any, x: Tensor) -> Any:
    n = x.shape[0]
    total = n
    total += n
    total += n
    return m.cell(x) * n + total


def _kept_in_attribute(m: Any, x: Tensor) -> Any:
    m.last = [m.cell(x)]
    return m.last[0] * 1


WRITES: list[Callable[[Any, Tensor], Any]] = [
    *(_old_value, _saved, _reset, _reset_and_written, _written_only, _carried, _carried_detached),
    *(_exchanged, _in_place_and_anew, _in_place, _local_name, _out, _input, _attribute_and_item),
    *(_numbers, _kept_in_attribute),
]


@captured
@pytest.mark.parametrize("call", WRITES)
def test_writes_as_in_eager(call: Callable[[Any, Tensor], Any], example: bool) -> None:
    model = Model(call)
    twin = copy.deepcopy(model)
    before = {**dict(twin.named_buffers()), "": twin.plain}
    gm = _traced(twin, example)
    now = {**dict(twin.named_buffers()), "": twin.plain}
    assert all(now[name] is b for name, b in before.items())  # tracing changes nothing
    assert not hasattr(twin, "last")
    loaded = pickle.loads(pickle.dumps(gm))
    expected = _steps(model)
    torch.testing.assert_close(_steps(gm), expected)
    torch.testing.assert_close(_steps(loaded), expected)


@captured
def test_state_has_the_history_of_one_call(example: bool) -> None:
    gm = _traced(Model(_carried_detached), example)
    for _ in range(3):
        gm(X).sum().backward()
    assert gm.h.grad_fn.next_functions[0][0] is None


class Tied(Model):
    def __init__(self, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(call)
        self.g = self.h


def _other_dtype(m: Any, x: Tensor) -> Any:
    m.count = m.count.long() + 1
    return m.cell(x)


def _other_shape(m: Any, x: Tensor) -> Any:
    m.h = m.h.sum(0)
    return m.cell(x)


def _no_tensor(m: Any, x: Tensor) -> Any:
    m.h = None
    return m.cell(x)


def _alias(m: Any, x: Tensor) -> Any:
    m.h = m.g.t().t()
    return m.cell(x)


@captured
@pytest.mark.parametrize(
    ("kind", "call", "found"),
    [
        (Model, _other_dtype, "'count'.*int64"),
        (Model, _other_shape, r"'h'.*\(3,\)"),
        (Model, _no_tensor, "'h'.*None"),
        (Model, _alias, "'h'.*memory of 'g'"),
        (Tied, _carried, "'[hg]'.*share"),
    ],
)
def test_what_cannot_be_written_to_a_buffer(
    kind: type[Model], call: Callable[[Any, Tensor], Any], found: str, example: bool
) -> None:
    model = kind(call)
    before = model.h
    with pytest.raises(TraceError, match=f"(?s)binds another tensor.*{found}"):
        _traced(model, example)
    assert model.h is before


def test_a_shape_that_tracing_does_not_know_is_checked_in_each_call() -> None:
    def call(m: Any, x: Tensor) -> Any:
        m.h = x.detach() * 2
        return m.cell(x)

    gm = _traced(Model(call), example=False)
    gm(X)
    with pytest.raises(RuntimeError, match="sizes mismatch"):
        gm(X[:1])


def test_random_numbers_and_writes_to_constants_are_refused() -> None:
    def draws(m: Any, x: Tensor) -> Any:
        return m.cell(x) + torch.rand(3)

    def fills(m: Any, x: Tensor) -> Any:
        table = torch.zeros(2, 4, dtype=torch.float64)
        table[:, :3] = m.cell(x)
        return table * 2

    def fills_what_may_be_one(m: Any, x: Tensor) -> Any:
        table = torch.zeros(2, 3).to(x)
        table[0] = x[0]
        return m.cell(table)

    def writes_the_plain(m: Any, x: Tensor) -> Any:
        m.plain += 1
        return m.cell(x) * m.plain

    def writes_afterwards(m: Any, x: Tensor) -> Any:
        shift = torch.zeros(3)
        y = m.cell(x) + shift
        shift += 1
        return y + shift

    for call in (draws, fills, fills_what_may_be_one, writes_the_plain, writes_afterwards):
        model = Model(call)
        with pytest.raises(TraceError, match="example_inputs="):
            _traced(model, example=False)
        assert model.plain.sum() == 0
        loaded = pickle.loads(pickle.dumps(_traced(copy.deepcopy(model), example=True)))
        torch.testing.assert_close(_steps(loaded), _steps(model))


@captured
def test_tracing_changes_no_attribute(example: bool) -> None:
    def changes(m: Any, x: Tensor) -> Any:
        m.calls += 1
        m.seen.append(x.shape[0] if example else "a call")
        m.by_name["last"] = m.calls
        return m.cell(x)

    model = Model(changes)
    model.calls, model.seen, model.by_name = 0, [], {}  # type: ignore[assignment]
    seen, by_name = model.seen, model.by_name
    gm = _traced(model, example)
    assert (model.calls, model.seen, model.by_name) == (0, [], {})
    assert model.seen is seen and model.by_name is by_name
    torch.testing.assert_close(gm(X), model(X))


def test_a_refused_trace_leaves_no_constant() -> None:
    def branches(m: Any, x: Tensor) -> Any:
        y = m.cell(x) + torch.ones(3)
        return y if y.sum() > 0 else x

    model = Model(branches)
    before = dict(vars(model))
    with pytest.raises(TraceError, match="control flow"):
        fxparam.Tracer().trace(model)
    assert vars(model) == before


def test_a_constant_is_returned_as_a_copy() -> None:
    gm = _traced(Model(lambda m, x: (m.cell(x), torch.zeros(3))), example=False)
    gm(X)[1].add_(1)
    assert gm(X)[1].sum() == 0


@captured
def test_equal_constants_are_one(example: bool) -> None:
    model = helpers.Loop(lambda m: orthogonal(m, orthogonal_map="cayley"))
    x = torch.randn(2, 5, dtype=torch.float64)
    gm = fxparam.symbolic_trace(model, example_inputs=(x,) if example else None)
    torch.testing.assert_close(gm(x), model(x))
    assert sum("solve" in getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes) == 1


def _nan(payload: int) -> Tensor:
    return torch.tensor([0x7FC00000 + payload], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: [torch.zeros(1), torch.zeros(1)], 1),
        (lambda: [torch.tensor(0.0), torch.tensor(0.0)], 1),
        (lambda: [torch.zeros(1), -torch.zeros(1)], 2),
        (lambda: [_nan(0), _nan(0)], 1),
        (lambda: [_nan(0), _nan(1)], 2),
        (lambda: [torch.ones(1), torch.ones(1, dtype=torch.int32)], 2),
        (lambda: [torch.ones(3, 3), torch.ones(3, 3).mT], 2),
        (lambda: [torch.ones(3, 3)[1:], torch.ones(2, 3)], 1),
        (lambda: [torch.ones(2, 1, dtype=torch.complex64)] * 2, 1),
        (lambda: [torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1)], 2),
    ],
)
def test_constants_of_equal_bits_and_geometry_are_one(
    make: Callable[[], list[Tensor]], count: int
) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x[(...,) + (None,) * c.dim()] + c for c in make()]

    graph = fxparam.Tracer().trace(Shifted())
    assert len({node.target for node in graph.find_nodes(op="get_attr")}) == count


def test_a_constant_inside_a_transform_is_refused() -> None:
    def scaled(m: Any, x: Tensor) -> Any:
        return torch.vmap(lambda row: row * m.cell(x))(torch.ones(4, 3))

    with pytest.raises(TraceError, match="example_inputs="):
        _traced(Model(scaled), example=False)


@pytest.mark.parametrize("name", ["h", "g", "plain"])
def test_an_example_input_that_is_a_tensor_of_the_model(name: str) -> None:
    class Shifted(Model):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.cell(x) + other - 2 * getattr(self, name)

    model = Shifted(_saved)
    gm = fxparam.symbolic_trace(model, example_inputs=(X, getattr(model, name)))
    torch.testing.assert_close(gm(X, X), model(X, X))


_SCALE = [1.0]


def _scale_of(x: Tensor) -> float:
    return _SCALE[0]


torch.fx.wrap("_scale_of")


def test_a_wrapped_function_is_not_run() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * _scale_of(x)

    model = nn.Linear(3, 3, dtype=torch.float64)
    fxparam.register_parametrization(model, "weight", Scaled())
    gm = _traced(model, example=False)
    _SCALE[0] = 3.0
    torch.testing.assert_close(gm(X), model(X))


def test_extra_state() -> None:
    class Noted(Model):
        note: Any = 7

        def get_extra_state(self) -> Any:
            return self.note

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    for model in (Noted(_saved), nn.Sequential(Noted(_saved))):
        gm = _traced(model, example=False)
        for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
            assert list(each.state_dict()) == list(model.state_dict())
            model.load_state_dict(each.state_dict())
            each.load_state_dict(model.state_dict())


@captured
def test_hooks_on_the_model_itself(example: bool) -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 3, dtype=torch.float64)))
    model.register_forward_hook(lambda m, args, y: y * 2)
    model.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    torch.testing.assert_close(_traced(model, example)(X), model(X))
    assert "forward" not in vars(model)


class _Tenfold(torch.autograd.Function):
    """A backward that is not the one of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 10


class _CallsTenfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = weight_norm(nn.Linear(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return _Tenfold.apply(self.cell(x))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_custom_backward_is_there_when_traced_without_gradients(hooked: bool) -> None:
    model = _CallsTenfold()
    if hooked:
        model.register_forward_hook(lambda m, args, y: y * 3)
    with torch.no_grad():
        gm = fxparam.symbolic_trace(model, example_inputs=(X,))
        torch.testing.assert_close(gm(X), model(X))
    found = []
    for run in (gm, model):
        x = X.clone().requires_grad_()
        run(x).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("region", ["checkpoint", "cond"])
def test_pickled_bodies_run_what_they_are_made_of(region: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        table = torch.zeros(2, 3, dtype=torch.float64)
        table[:, :2] = m.cell(x)[:, :2]
        table += 1
        return table * torch.rand(3) if region == "checkpoint" else table * 1

    def call(m: Any, x: Tensor) -> Any:
        if region == "cond":
            return torch.cond(x.sum() > 0, lambda x: body(m, x), lambda x: x * 2, (x,))
        return torch.utils.checkpoint.checkpoint(lambda x: body(m, x), x, use_reentrant=False)

    model = Model(call)
    gm = _traced(copy.deepcopy(model), example=True)
    loaded = pickle.loads(pickle.dumps(gm))
    for x in (X, -X):
        for run in (gm, loaded):
            torch.manual_seed(0)
            expected = model(x)
            torch.manual_seed(0)
            torch.testing.assert_close(run(x), expected)


# The grad mode.


def _no_grad_in_enable_grad(m: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        with torch.no_grad():
            n = x.norm()
        y = m.cell(x) / n
    return y


def _enable_grad(m: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        y = m.cell(x)
    return y, m.cell(x)


def _enable_grad_in_no_grad(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        n = m.cell(x).norm()
        with torch.enable_grad():
            y = m.cell(x) / n
        z = m.cell(x)
    return y, z, m.cell(x)


def _put_back_by_hand(m: Any, x: Tensor) -> Any:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    n = m.cell(x).norm()
    torch.set_grad_enabled(before)
    return m.cell(x) / n


def _left_off(m: Any, x: Tensor) -> Any:
    y = m.cell(x)
    torch.set_grad_enabled(False)
    return y


@torch.no_grad()
def _decorated(m: Any, x: Tensor) -> Any:
    return m.cell(x)


MODES: list[Callable[[Any, Tensor], Any]] = [
    *(_no_grad_in_enable_grad, _enable_grad, _enable_grad_in_no_grad),
    *(_put_back_by_hand, _left_off, _decorated),
]


def _under(run: nn.Module, enabled: bool) -> Any:
    """What requires a gradient of a call in a grad mode, and the mode that it leaves behind."""
    with torch.set_grad_enabled(enabled):
        out = run(X)
        tensors = out if isinstance(out, tuple) else (out,)
        return [t.requires_grad for t in tensors], torch.is_grad_enabled()


@captured
@pytest.mark.parametrize("traced_in", [True, False], ids=["traced-in-grad", "traced-in-no-grad"])
@pytest.mark.parametrize("call", MODES)
def test_grad_modes_as_in_eager(
    call: Callable[[Any, Tensor], Any], traced_in: bool, example: bool
) -> None:
    model = Model(call)
    with torch.set_grad_enabled(traced_in):
        gm = _traced(model, example)
        assert torch.is_grad_enabled() is traced_in
    for run in (gm, pickle.loads(pickle.dumps(gm))):
        for enabled in (True, False):
            assert _under(run, enabled) == _under(model, enabled)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_a_custom_backward_is_not_lost() -> None:
    model = Model(lambda m, x: _RoundThrough.apply(m.cell(x)))
    with pytest.raises(TraceError, match="_RoundThrough, whose backward would be lost"):
        _traced(model, example=False)
    twin = copy.deepcopy(model)
    _traced(twin, example=True)(X).sum().backward()
    model(X).sum().backward()
    for actual, expected in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("where", ["", "cell"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_is_not_lost(kind: str, where: str) -> None:
    model = Model(lambda m, x: m.cell(x))
    getattr(model.get_submodule(where), kind)(lambda module, grads, *_: grads)
    with pytest.raises(TraceError, match="a backward hook on the module"):
        _traced(model, example=False)


@pytest.mark.parametrize(
    ("op", "wanted"), [(operator.not_, False), (operator.truth, True), (operator.is_, True)]
)
def test_pickled_answers(op: Any, wanted: bool) -> None:
    gm = fxparam.symbolic_trace(Model(lambda m, x: m.cell(x)), example_inputs=(X,))
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        size = gm.graph.call_method("size", (output.args[0], 0))
        answer = gm.graph.call_function(op, (size, size) if op is operator.is_ else (size,))
        output.args = ((output.args[0], answer),)
    gm.recompile()
    for run in (gm, pickle.loads(pickle.dumps(gm))):
        assert run(X)[1] is wanted
