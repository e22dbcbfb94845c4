"""``fxparam.explain``: the right tensor, rule, line and number, and no trace of it afterwards."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

import fxparam
from fxparam.__main__ import main
from fxparam.explaining.advice import change_for
from fxparam.explaining.explanation import Explanation
from fxparam.graph.rules import Rule
from tests.helpers import COUNTS, Counting, LowRank, RandomMask


def _linear(parametrization: nn.Module, size: int = 4) -> nn.Linear:
    layer = nn.Linear(size, size, bias=False)
    register_parametrization(layer, "weight", parametrization)
    return layer


def _line(function: Callable[..., Any], text: str) -> str:
    """Return the place of the one line of a function that has some text."""
    lines, first = inspect.getsourcelines(function)
    (at,) = [i for i, line in enumerate(lines) if text in line]
    return f"{__file__}:{first + at}"


class Breaks(nn.Module):
    """Reads a weight twice on each side of a graph break."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x))
        torch._dynamo.graph_break()  # here
        return self.layer(self.layer(x))


class Repeats(nn.Module):
    def __init__(self, layer: nn.Module, times: int = 3) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


class AGradient(torch.autograd.Function):
    """The backward of a square, that need not be additive for all that is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 * x * grad).clamp(-1, 1)


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return AGradient.apply(x)


def _written(layer: nn.Linear, x: Tensor) -> Tensor:
    x = layer(x)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(2)
    return layer(x)  # again


def _value_written(layer: nn.Linear, x: Tensor) -> Tensor:
    x = x @ layer.weight.mul_(2)
    return x @ layer.weight  # again


def _modes(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = layer(x)
    return layer(x)  # again


def _twice(layer: nn.Linear, x: Tensor) -> Tensor:
    x = layer(x)
    return layer(x)  # again


def _escapes(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    first = layer.weight
    return first, layer.weight  # again


def _in_a_branch(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: layer(x), lambda x: x + 0, (x,))  # again


REFUSALS = {
    "custom backward": (_twice, lambda: _linear(Clipped()), 1),
    "original written": (_written, lambda: _linear(LowRank(4)), 2),
    "value written": (_value_written, lambda: _linear(LowRank(4)), 3),
    "value escapes": (_escapes, lambda: _linear(LowRank(4)), 3),
    "modes": (_modes, lambda: _linear(LowRank(4)), 4),
    "random": (_twice, lambda: _linear(RandomMask()), 5),
    "writes": (_twice, lambda: spectral_norm(nn.Linear(4, 4)), 5),
    "branch": (_in_a_branch, lambda: _linear(LowRank(4)), 6),
}


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", REFUSALS)
def test_each_refusal_has_its_rule_its_line_and_what_to_change(kind: str) -> None:
    function, make, number = REFUSALS[kind]
    torch.manual_seed(0)
    explanation = fxparam.explain(function, make(), torch.rand(2, 4))
    (tensor,) = (each for each in explanation.tensors if each.kind)
    refusals = tensor.refused
    assert {each.number for each in refusals} == {number}
    assert tensor.runs == tensor.runs_before
    assert _line(function, "# again") in refusals[0].where
    assert refusals[0].change == change_for(Rule[refusals[0].rule])
    shown = str(explanation)
    assert refusals[0].reason in shown and refusals[0].change in shown


def test_every_rule_has_a_change() -> None:
    assert all(change_for(rule) for rule in Rule)


def test_breaks_have_reasons_and_lines() -> None:
    explanation = fxparam.explain(Breaks(orthogonal(nn.Linear(4, 4))), torch.randn(2, 4))
    first, second = explanation.graphs
    assert second.end is None and first.end is not None
    assert first.end.where == _line(Breaks, "# here")
    assert "graph_break" in first.end.reason
    assert "break at tests/explaining/test_explain.py:" in str(explanation)


@pytest.mark.parametrize("scope", ["graph", "call"])
def test_evaluations_are_those_that_run_in_the_scope(scope: str) -> None:
    model, x = Breaks(_linear(Counting())), torch.randn(2, 4)
    explanation = fxparam.explain(model, x, scope=scope)
    (tensor,) = explanation.tensors
    compiled = fxparam.compile(model, scope=scope, backend=fxparam.backend("eager"))
    compiled(x)
    COUNTS["forward"] = 0
    compiled(x)
    assert tensor.runs == COUNTS["forward"] == {"graph": 2, "call": 1}[scope]
    assert (tensor.accesses, tensor.runs_before) == (4, 4)


def test_the_scope_that_would_save_more_has_numbers() -> None:
    model, x = Breaks(_linear(LowRank(4))), torch.randn(2, 4)
    told = {each.scope: (each.runs, each.now) for each in fxparam.explain(model, x).scopes}
    assert told == {"call": (1, 2), "step": (1, 16)}
    with torch.no_grad():
        inference = fxparam.explain(model, x)
    assert {each.scope: each.runs for each in inference.scopes} == {"call": 1, "frozen": 0}
    assert "fxparam.compile(model, scope='call') would save 1 of 2 evaluations" in str(inference)
    assert [each.scope for each in fxparam.explain(model, x, scope="call").scopes] == ["step"]


def test_a_scope_does_not_lift_every_refusal() -> None:
    def model(x: Tensor) -> Tensor:
        x = _modes(layer, x)
        torch._dynamo.graph_break()
        return layer(x)

    layer = _linear(LowRank(4))
    (told,) = (e for e in fxparam.explain(model, torch.ones(1, 4)).scopes if e.scope == "call")
    assert (told.runs, told.now) == (2, 3)


def test_what_was_moved_lowered_and_batched() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = orthogonal(nn.Linear(48, 48))

        def forward(self, x: Tensor) -> Tensor:
            def step(h: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
                h = torch.tanh(self.cell(h)) + read
                return h, h + 0

            return torch._higher_order_ops.scan(step, x, x.new_ones(3, 1, 48))[0]

    (tensor,) = fxparam.explain(Scan(), torch.randn(2, 48)).tensors
    assert tensor.hoisted_from == (("scan", 3),)
    assert tensor.lowered == ("matrix_exp",)
    assert (tensor.accesses, tensor.runs_before, tensor.runs, tensor.saved) == (1, 3, 1, 2)

    layers = nn.Sequential(*(orthogonal(nn.Linear(8, 8)) for _ in range(4)))
    tensors = fxparam.explain(layers, torch.randn(2, 8)).tensors
    assert tensors[0].batched_with == ("1.weight", "2.weight", "3.weight")


def test_costs_are_those_that_eager_counts() -> None:
    layer = _linear(LowRank(8, 2), 8)
    (tensor,) = fxparam.explain(Repeats(layer), torch.randn(2, 8)).tensors
    with FlopCounterMode(display=False) as counter:
        value = layer.weight
        forward = counter.get_total_flops()
        value.sum().backward()
    assert tensor.forward is not None and tensor.backward is not None
    assert tensor.forward.flops == forward == 2 * 8 * 2 * 8
    assert tensor.backward.flops == counter.get_total_flops() - forward
    # A product reads and writes 2 * 16 + 64 values, a sum 3 * 64.
    assert tensor.forward.bytes == 4 * (32 + 64 + 192)
    assert fxparam.explain(Repeats(layer), torch.randn(2, 8)).saved == (
        tensor.forward * 2,
        tensor.backward * 2,
    )


@pytest.mark.parametrize(
    "parametrize",
    [
        orthogonal,
        functools.partial(orthogonal, orthogonal_map="cayley"),
        functools.partial(orthogonal, orthogonal_map="householder"),
        weight_norm,
        spectral_norm,
    ],
    ids=["matrix_exp", "cayley", "householder", "weight_norm", "spectral_norm"],
)
def test_costs_of_torchs_parametrizations_are_known(parametrize: Callable[..., Any]) -> None:
    explanation = fxparam.explain(Repeats(parametrize(nn.Linear(6, 6))), torch.randn(2, 6))
    (tensor,) = explanation.tensors
    assert tensor.forward is not None and tensor.backward is not None
    assert tensor.forward.bytes > 0 and tensor.backward.bytes > 0
    assert explanation.not_in_saved == ()


def test_a_saving_that_is_not_known_is_said() -> None:
    layer = _linear(LowRank(4))

    def model(x: Tensor) -> Tensor:
        def grow(x: Tensor) -> tuple[Tensor]:
            return (x + layer(x).abs() + 1,)

        return torch.while_loop(lambda x: x.sum() < 9, grow, (x,))[0]

    with torch.no_grad():
        explanation = fxparam.explain(model, torch.ones(1, 4))
    assert explanation.not_in_saved == ("layer.weight",)
    assert "not known: layer.weight" in str(explanation)


def test_a_tensor_is_not_taken_for_one_whose_name_ends_alike() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"layer": _linear(LowRank(4))})
            self.layer = _linear(LowRank(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["layer"](x)

    explanation = fxparam.explain(Both(), torch.ones(1, 4))
    assert explanation.unseen == ("layer.weight",)


def test_ops_that_inductor_calls_are_told_if_asked() -> None:
    model, x = Repeats(_linear(LowRank(4))), torch.randn(2, 4)
    assert fxparam.explain(model, x).extern_calls is None
    calls = fxparam.explain(model, x, inductor=True).extern_calls
    assert calls is not None and calls["mm"] > 0
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model[1].weight.grad = gradient = torch.ones(4)
    explanation = fxparam.explain(model, torch.randn(3, 4, generator=torch.Generator()))
    assert isinstance(explanation, Explanation)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].weight.grad is gradient
    assert type(model[0]).__name__ == "ParametrizedLinear"


def test_tensors_of_the_same_name_are_told_apart() -> None:
    a, b = _linear(Counting()), _linear(LowRank(4))
    explanation = fxparam.explain(lambda x: a(a(b(x))), torch.ones(1, 4))
    rows = {each.name: (each.kind, each.runs_before, each.runs) for each in explanation.tensors}
    assert rows == {"a.weight": (("Counting",), 2, 1), "b.weight": (("LowRank",), 1, 1)}


@pytest.mark.parametrize("scope", ["graph", "call"])
def test_a_graph_counts_as_often_as_it_runs(scope: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = _linear(Counting())

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            torch._dynamo.graph_break()
            return self.layer(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = self.inner(x)
            return x

    model, x = Outer(), torch.randn(2, 4)
    (tensor,) = fxparam.explain(model, x, scope=scope).tensors
    compiled = fxparam.compile(model, scope=scope, backend=fxparam.backend("eager"))
    compiled(x)
    COUNTS["forward"] = 0
    compiled(x)
    assert tensor.runs == COUNTS["forward"] == {"graph": 10, "call": 1}[scope]
    assert tensor.runs_before == 10


@pytest.mark.parametrize("function", [_written, _modes])
def test_a_step_is_not_promised_what_rules_refuse(function: Callable[..., Tensor]) -> None:
    layer, x = _linear(Counting()), torch.rand(2, 4)
    assert "step" not in {each.scope for each in fxparam.explain(function, layer, x).scopes}


def test_what_no_graph_has_is_told() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = _linear(Counting())

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(self.layer(x))
                torch._dynamo.graph_break()
            return x

    class InARegion(Loop):
        def forward(self, x: Tensor) -> Tensor:
            with fxparam.cached(self):
                return self.layer(self.layer(x))

    for model in (Loop(), InARegion()):
        explanation = fxparam.explain(model, torch.rand(2, 4))
        assert explanation.tensors or explanation.unseen == ("layer.weight",)
        shown = str(explanation)
        assert explanation.tensors or "No graph names layer.weight" in shown
    assert any(
        "graph_break" in reason for reason in fxparam.explain(Loop(), torch.rand(2, 4)).breaks
    )


def test_functions_leave_nothing_behind_either() -> None:
    norm, layer = nn.BatchNorm1d(4), spectral_norm(nn.Linear(4, 4))

    class Trainer:
        def __init__(self) -> None:
            self.model = nn.Sequential(layer, norm)

        def step(self, x: Tensor) -> Tensor:
            return self.model(x)

    modules = nn.ModuleList([norm, layer])
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    fired = []
    for parameter in modules.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    x = torch.randn(3, 4, requires_grad=True)
    together = functools.partial(nn.Sequential(layer, norm))
    for model in (lambda x: norm(layer(x)), together, Trainer().step):
        fxparam.explain(model, x)
        fxparam.explain(model, x, inductor=model is together)
        for name, value in modules.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert x.grad is None and all(p.grad is None for p in modules.parameters())
    fxparam.explain(lambda model, x: model(x), nn.Sequential(layer, norm), x)
    assert all(torch.equal(v, before[n]) for n, v in modules.state_dict().items())
    assert fired == []
    assert "_is_torch_compile" not in vars(layer)


def test_the_dictionary_is_stable_and_json() -> None:
    found = fxparam.explain(Repeats(weight_norm(nn.Linear(4, 4))), torch.randn(2, 4)).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["version"] == 1
    assert set(found) == {
        "version",
        "scope",
        "graphs",
        "tensors",
        "saved",
        "scopes",
        "extern_calls",
        "unseen",
        "breaks",
    }
    (tensor,) = found["tensors"]
    assert {key: tensor[key] for key in ("name", "kind", "accesses", "runs_before", "runs")} == {
        "name": "layer.weight",
        "kind": ["_WeightNorm"],
        "accesses": 3,
        "runs_before": 3,
        "runs": 1,
    }


def test_a_table_needs_no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = fxparam.explain(Repeats(weight_norm(nn.Linear(4, 4))), torch.randn(2, 4))
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = str(explanation).splitlines()
    (row,) = (line.split() for line in lines if line.startswith("layer.weight"))
    assert row[:5] == ["layer.weight", "_WeightNorm", "3", "3", "1"]


def test_models_of_any_kind() -> None:
    x = torch.randn(2, 4)
    plain = fxparam.explain(nn.Linear(4, 4), x)
    assert plain.tensors == () and "No graph evaluates" in str(plain)
    raw = nn.Parameter(torch.randn(4, 4))

    def computed(x: Tensor, *, times: int) -> Tensor:
        for _ in range(times):
            x = x @ nn.functional.softplus(raw)
        return x

    (value,) = fxparam.explain(computed, x, times=3).tensors
    assert (value.name, value.kind, value.runs) == ("softplus(L_raw)", (), 1)
    model = Repeats(weight_norm(nn.Linear(4, 4)))
    (bound,) = fxparam.explain(model.forward, x).tensors
    assert bound.runs == 1
    with pytest.raises(ValueError, match="scope must be one of"):
        fxparam.explain(model, x, scope="step")
    with pytest.raises(TypeError, match="model must be a module or a function"):
        fxparam.explain(3)
    assert fxparam.explain(functools.partial(computed, times=2), x).tensors[0].runs_before == 2


def test_a_graph_that_no_pass_has_seen_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_DISABLE", "1")
    explanation = fxparam.explain(Repeats(weight_norm(nn.Linear(4, 4))), torch.randn(2, 4))
    (graph,) = explanation.graphs
    assert graph.before == graph.after


MODULE = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = weight_norm(nn.Linear(4, 4))

    def forward(self, x, y):
        return self.layer(self.layer(x)) + y

def make():
    return Twice(), (torch.ones(2, 4),), {"y": 1}

def function():
    return torch.tanh, torch.ones(2, 4)

def no_names():
    return Twice(), (), {1: torch.ones(2, 4)}

def stops():
    raise SystemExit(0)

def raises():
    def model(x):
        import nowhere_to_be_found
    return model, torch.ones(2, 4)

def reserved():
    return Twice(), (), {"scope": 1}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "explain_examples.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("explain_examples", None)
    return "explain_examples"


def test_the_command(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--html", "out.html", "--json", "out.json", "--scope", "call"]
    assert main(["explain", f"{module}:make", *arguments]) == 0
    assert "layer.weight" in capsys.readouterr().out
    assert "<!doctype html>" in (tmp_path / "out.html").read_text()
    assert json.loads((tmp_path / "out.json").read_text())["scope"] == "call"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere:make"], "cannot import 'nowhere'"),
        (["{}:reserved"], "inputs may not be named scope"),
        (["{}:function", "--scope", "call"], "--scope call is for modules"),
        (["{}:no_names"], "must return a model and its inputs"),
        (["{}:stops"], "failed: SystemExit: 0"),
        (["{}:make", "--json", "/dev/full"], "No space left on device"),
        (["{}:make", "--html", "no/such/folder.html"], "not a file in a folder that exists"),
    ],
)
def test_a_wrong_command_is_a_line_and_code_2(
    module: str, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *(a.format(module) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxparam explain: ") and line in error and error.count("\n") == 1


def test_an_error_of_the_model_is_shown_as_it_is(module: str) -> None:
    with pytest.raises(ImportError, match="nowhere_to_be_found"):
        main(["explain", f"{module}:raises"])
