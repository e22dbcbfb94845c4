"""Symbolic tracing: parametrizations inlined and evaluated once, over the model's tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam
from fxparam.graph.passes.naming import Step
from tests import helpers, zoo

WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "counting": lambda m: parametrize.register_parametrization(m, "weight", helpers.Counting()),
    "fxparam": lambda m: fxparam.register_parametrization(m, "weight", helpers.Counting()),
    "orthogonal": orthogonal,
    "spectral_norm": spectral_norm,
    "weight_norm": weight_norm,
    "random": lambda m: parametrize.register_parametrization(m, "weight", helpers.RandomMask()),
    "writes": lambda m: parametrize.register_parametrization(m, "weight", zoo.Steps()),
}


def _chain(m: nn.Module) -> None:
    for step in (zoo.Double(), helpers.MatrixExponential(), helpers.Counting()):
        parametrize.register_parametrization(m, "weight", step)


def _input() -> Tensor:
    return torch.randn(2, 5, dtype=torch.float64)


def _run(model: nn.Module, run: nn.Module, *args: Any) -> tuple[Any, dict[str, Any]]:
    """Output and everything that a training step leaves behind."""
    model.zero_grad()
    torch.manual_seed(0)
    out = run(*args)
    out.square().sum().backward()
    left = {f"grad of {k}": p.grad for k, p in model.named_parameters()}
    return out, {**left, **{k: b.clone() for k, b in model.named_buffers()}}


def check(model: nn.Module, *args: Any, **options: Any) -> torch.fx.GraphModule:
    """Trace a copy; outputs, gradients and buffers equal eager's, and the graph is in order."""
    twin = copy.deepcopy(model)
    gm = fxparam.symbolic_trace(twin, **options)
    gm.graph.lint()
    assert not fxparam.hoist(gm).modified
    assert list(gm.state_dict()) == list(model.state_dict())
    for (_, p), (_, q) in zip(gm.named_parameters(), twin.named_parameters(), strict=True):
        assert p is q
    for _ in range(2):
        expected, left = _run(model, model, *args)
        actual, left_by_graph = _run(twin, gm, *args)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(left_by_graph, left)
    return gm


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_equals_eager(wrap: str, training: bool, example: bool) -> None:
    model = helpers.Loop(WRAPS[wrap]).train(training)
    x = _input()
    check(model, x, example_inputs=(x,) if example else None)


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])
@pytest.mark.parametrize("share", [False, True])
def test_evaluations_counted(share: bool, example: bool) -> None:
    model, x = helpers.Loop(_chain), _input()
    gm = fxparam.symbolic_trace(model, share=share, example_inputs=(x,) if example else None)
    counts = helpers.counted(lambda: gm(x).sum().backward())
    assert counts == ((1, 1) if share else (6, 6))


class _Returns(helpers.Loop):
    """The last access's output leaves the graph; nothing of its alias is known by declaration."""

    def forward(self, x: Tensor) -> Any:
        return self.cell(torch.tanh(self.cell(x)))


class _Leaves(nn.Module):
    """Between two accesses run modules that are leaves, one of which writes buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(5, 5, dtype=torch.float64)
        _chain(self.cell)
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.cell(self.act(self.norm(self.cell(x)))))


class _WritesOriginal(helpers.Loop):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.cell(x))
        with torch.no_grad():
            self.cell.parametrizations.weight.original.mul_(0.9)
        return torch.tanh(self.cell(x))


class _UserFunction(helpers.Loop):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.cell(_unseen(torch.tanh(self.cell(x)))))


def _unseen(x: Tensor) -> Tensor:
    return x + 1


torch.fx.wrap("_unseen")


class _NoGrad(helpers.Loop):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.cell(x))
        x = torch.tanh(self.cell(x))
        return torch.tanh(self.cell(x))


@pytest.mark.parametrize(
    ("model", "evaluations"),
    [(_Returns, 1), (_WritesOriginal, 2), (_UserFunction, 2), (_NoGrad, 2)],
)
def test_conservative_without_example_inputs(
    model: Callable[..., nn.Module], evaluations: int
) -> None:
    made, x = model(_chain), _input()
    if model is _WritesOriginal:  # in eager and in the graph, autograd refuses the second write
        gm = fxparam.symbolic_trace(made)
        with torch.no_grad():
            expected = copy.deepcopy(made)(x)
            torch.testing.assert_close(gm(x), expected)
    else:
        gm = check(made, x)
    with torch.no_grad():
        assert helpers.counted(lambda: gm(x))[0] == evaluations


def test_leaf_modules_between_accesses() -> None:
    model, x = _Leaves(), _input()
    gm = check(model, x)
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == ["norm", "act"]
    assert helpers.counted(lambda: gm(x))[0] == 1


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])
def test_the_grad_mode_is_that_of_the_caller(example: bool) -> None:
    model, x = _NoGrad(_chain), _input()
    gm = fxparam.symbolic_trace(model, example_inputs=(x,) if example else None)
    assert gm(x).requires_grad
    for run in (gm, pickle.loads(pickle.dumps(gm))):
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
            assert not torch.is_grad_enabled()
        assert run(x).requires_grad


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])
def test_a_rebound_buffer_is_written(example: bool) -> None:
    class Counts(helpers.Loop):
        def __init__(self) -> None:
            super().__init__(_chain)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x * self.calls)

    model, x = Counts(), _input()
    before = model.calls
    gm = check(model, x, example_inputs=(x,) if example else None)
    assert gm.calls == 2
    fxparam.symbolic_trace(model)
    assert before == 0 and model.calls == 2  # tracing changes nothing


class _Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3)
        _chain(self.cell)

    def forward(self, xs: Any, named: Any, *rest: Tensor) -> Any:
        a = self.cell(xs[0]) * self.cell(named["k"])
        for r in rest:
            a = a + r
        return {"a": a, "b": (xs[1], [a.sum()])}


def test_structured_arguments_and_results() -> None:
    model = _Structured()
    x, y, z = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    same = ([x, x], {"k": x}, x, x)
    gm = fxparam.symbolic_trace(model, example_inputs=same)
    args = ([x, y], {"k": z}, y, z)
    for run in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        torch.testing.assert_close(run(*args), model(*args))
    small = ([x[:1], y[:1]], {"k": z[:1]}, y[:1], z[:1])
    torch.testing.assert_close(gm(*small), model(*small))  # the batch is not fixed


def _parametrized(module: nn.Module, name: str) -> nn.Module:
    parametrize.register_parametrization(module, name, helpers.Counting())
    return module


_IMAGE = (torch.randn(2, 2, 6, 6),)
BUILTIN: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "RNNCell": (lambda: _parametrized(nn.RNNCell(3, 3), "weight_hh"), (torch.randn(2, 3),)),
    "LSTMCell": (lambda: _parametrized(nn.LSTMCell(3, 3), "weight_hh"), (torch.randn(2, 3),)),
    "GRUCell": (lambda: _parametrized(nn.GRUCell(3, 3), "weight_ih"), (torch.randn(2, 3),)),
    "MultiheadAttention": (
        lambda: _parametrized(nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (torch.randn(3, 2, 4),) * 3,
    ),
    **{
        f"Conv2d {mode}": (
            lambda mode=mode: _parametrized(
                nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), "weight"
            ),
            _IMAGE,
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "ConvTranspose2d": (lambda: _parametrized(nn.ConvTranspose2d(2, 3, 3), "weight"), _IMAGE),
}


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_modules(name: str) -> None:
    make, args = BUILTIN[name]
    model = make()
    expected = model(*args)
    gm = fxparam.symbolic_trace(model, example_inputs=args)
    torch.testing.assert_close(gm(*args), expected)
    assert helpers.counted(lambda: gm(*args))[0] == 1
    assert list(gm.state_dict()) == list(model.state_dict())
    outer = nn.Sequential(model)
    if "Cell" in name or "Attention" in name:
        with pytest.raises(
            torch.fx.proxy.TraceError, match=rf"0 \(Parametrized{name}\)(.|\n)*example_inputs="
        ):
            fxparam.symbolic_trace(outer)
    elif "Transpose" not in name:
        torch.testing.assert_close(fxparam.symbolic_trace(outer)(*args), expected)


def test_a_leaf_if_the_user_says_so() -> None:
    class Mine(fxparam.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name == "cell" or super().is_leaf_module(
                m, module_qualified_name
            )

    graph = Mine().trace(helpers.Loop(orthogonal))
    assert {n.target for n in graph.find_nodes(op="call_module")} == {"cell"}


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="one of concrete_args and example_inputs"):
        fxparam.symbolic_trace(nn.Linear(2, 2), {"input": 1}, example_inputs=(torch.ones(2),))


@pytest.mark.parametrize("example", [False, True])
def test_an_error_names_a_model_and_does_not_print_it(example: bool) -> None:
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else super().forward(x)

    layers = [nn.Linear(5, 5) for _ in range(200)]
    inputs = (_input(),) if example else None
    cases: list[tuple[Any, type[Exception], str]] = [(layers, TypeError, "found: list")]
    if not example:  # with one it is Dynamo that says what it cannot do
        cases.append((Branches(*layers), TraceError, r"the model \(Branches\)"))
    for root, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            fxparam.symbolic_trace(root, example_inputs=inputs)
        assert len(str(caught.value)) < 600


def test_modes_that_are_not_recorded_are_refused() -> None:
    class Autocast(helpers.Loop):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                return super().forward(x)

    with pytest.raises(torch.fx.proxy.TraceError, match="autocast"):
        fxparam.symbolic_trace(nn.Sequential(Autocast(_chain)))


def test_names_and_steps() -> None:
    gm = fxparam.symbolic_trace(helpers.Loop(_chain))
    marked = [(n.name, n.meta["fxparam"]) for n in gm.graph.nodes if "fxparam" in n.meta]
    assert marked == [
        ("mul", Step("cell.weight", 0)),
        ("matrix_exp", Step("cell.weight", 1)),
        ("cell_weight", Step("cell.weight", 2)),
    ]
    assert all("nn_module_stack" in n.meta for n in gm.graph.nodes if "fxparam" in n.meta)


def test_functions_are_traced_too() -> None:
    cell = helpers.Loop(_chain)
    gm = fxparam.symbolic_trace(lambda x: torch.tanh(x) + 1)
    x = _input()
    torch.testing.assert_close(gm(x), torch.tanh(x) + 1)
    assert cell.steps == 6


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "captured"])
def test_copies(example: bool) -> None:
    class Holds(helpers.Loop):
        def __init__(self) -> None:
            super().__init__(orthogonal)
            self.unused = nn.Parameter(torch.ones(2))
            self.register_buffer("hidden", torch.ones(2), persistent=False)
            self.again = self.cell

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor(2.0)

    model, x = Holds(), _input()
    gm = fxparam.symbolic_trace(model, example_inputs=(x,) if example else None)
    saved = io.BytesIO()
    torch.save(gm, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(gm),
        pickle.loads(pickle.dumps(gm)),
        torch.load(saved, weights_only=False),
    )
    for each in (gm, *copies):
        assert list(each.state_dict()) == list(model.state_dict())
        torch.testing.assert_close(each(x), model(x))
        each(x).sum().backward()
        assert each.cell.parametrizations.weight.original.grad is not None


def test_training_the_graph_trains_the_model() -> None:
    model, x = helpers.Loop(orthogonal), _input()
    gm = fxparam.symbolic_trace(model)
    torch.optim.SGD(gm.parameters(), lr=0.1).step(lambda: gm(x).sum().backward())
    torch.testing.assert_close(gm(x), model(x))
    gm.load_state_dict(helpers.Loop(orthogonal).state_dict())
    torch.testing.assert_close(gm(x), model(x))


class _Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(5, 5, dtype=torch.float64)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("share", [False, True])
def test_a_plain_tensor_attribute(share: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 5, dtype=torch.float64))
    parametrize.register_parametrization(model[0], "weight", _Shifted())
    gm = fxparam.symbolic_trace(model, share=share)
    x = _input()
    torch.testing.assert_close(gm(x), model(x))
    assert gm.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(pickle.loads(pickle.dumps(gm))(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x + torch.zeros(x.shape[0], 4),
        lambda x: x * float(x.sum()),
        lambda x: [x + i for i in range(x.shape[0])],
    ],
)
def test_what_cannot_be_traced_without_example_inputs_says_so(forward: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return forward(x)

    with pytest.raises(
        torch.fx.proxy.TraceError, match=r"the model \(Model\)(.|\n)*example_inputs="
    ):
        fxparam.symbolic_trace(Model())
