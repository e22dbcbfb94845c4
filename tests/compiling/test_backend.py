"""The backend on whole models: results equal eager's, evaluations counted at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import fxparam
from fxparam.compiling.backend import Backend, backend
from tests import helpers, zoo
from tests.helpers import Counting, Loop, check_against_eager, counted


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def _register(*kinds: Any) -> Any:
    def wrap(cell: nn.Module) -> None:
        for kind in kinds:
            register_parametrization(cell, "weight", kind().double())

    return wrap


def _orthogonal(name: str) -> Any:
    return lambda cell: parametrizations.orthogonal(cell, orthogonal_map=name)


SHARED = {
    "symmetric": _register(zoo.Symmetric),
    "skew": _register(zoo.Skew),
    "low rank": _register(lambda: helpers.LowRank(5)),
    "chain of three": _register(zoo.Skew, helpers.MatrixExponential, zoo.Symmetric),
    "matrix_exp": _orthogonal("matrix_exp"),
    "cayley": _orthogonal("cayley"),
    "householder": _orthogonal("householder"),
    "weight norm": parametrizations.weight_norm,
}


@pytest.mark.parametrize("name", SHARED)
def test_a_loop_evaluates_once_and_equals_eager(name: str) -> None:
    fx = backend("aot_eager")
    check_against_eager(Loop(SHARED[name]), fx, torch.randn(2, 5, dtype=torch.float64))
    (entry,) = fx.last_report.entries
    assert (entry.name, entry.accesses, entry.evaluations) == ("cell.weight", 6, 1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_one_forward_and_one_backward_at_run_time(inner: str) -> None:
    model = Loop(_register(zoo.Symmetric, Counting))
    x = torch.randn(2, 5, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend(inner))
    compiled(x)

    assert counted(lambda: model(x).sum().backward()) == (6, 6)
    assert counted(lambda: compiled(x).sum().backward()) == (1, 1)


def test_our_own_registration_is_shared_too() -> None:
    def wrap(cell: nn.Module) -> None:
        fxparam.register_parametrization(cell, "weight", zoo.Symmetric())
        fxparam.register_parametrization(cell, "weight", Counting())

    fx = backend("aot_eager")
    model, x = Loop(wrap), torch.randn(2, 5, dtype=torch.float64)
    check_against_eager(model, fx, x)
    (entry,) = fx.last_report.entries
    assert (entry.name, entry.accesses, entry.evaluations) == ("cell.weight", 6, 1)


def test_spectral_norm_keeps_its_power_iterations_in_training() -> None:
    fx = backend("aot_eager")
    model = Loop(parametrizations.spectral_norm)
    check_against_eager(model, fx, torch.randn(2, 5, dtype=torch.float64))
    (entry,) = fx.last_report.entries
    assert entry.evaluations == 6
    assert sum(refusal.count for refusal in entry.refused) == 5


def test_spectral_norm_is_shared_in_evaluation_mode() -> None:
    fx = backend("aot_eager")
    model = Loop(parametrizations.spectral_norm).eval()
    check_against_eager(model, fx, torch.randn(2, 5, dtype=torch.float64))
    assert fx.last_report.entries[0].evaluations == 1


def test_random_masks_are_drawn_at_each_access() -> None:
    fx = backend("aot_eager")
    check_against_eager(
        Loop(_register(helpers.RandomMask)), fx, torch.randn(2, 5, dtype=torch.float64)
    )
    assert fx.last_report.entries[0].evaluations == 6


class _NormalizesByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class _ScalesByStatistic(_NormalizesByBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.norm.running_var


def test_batch_norm_as_a_parametrization_updates_its_statistics_at_each_access() -> None:
    fx = backend("aot_eager")
    model = Loop(_register(_NormalizesByBatch))
    check_against_eager(model, fx, torch.randn(2, 5, dtype=torch.float64))
    assert fx.last_report.entries[0].evaluations == 6


def test_a_read_for_the_shape_alone_is_no_evaluation_of_its_own() -> None:
    class Frame(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.matrix_exp(x)[..., :4]

    cell = nn.Linear(4, 4, bias=False)
    nn.utils.parametrize.register_parametrization(cell, "weight", Frame())

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x[:, : cell.weight.shape[0]]  # what is computed for it is dead, but for what is shared
        for _ in range(3):
            x = torch.tanh(cell(x))
        return x

    fx = fxparam.backend("eager")
    torch.compile(run, backend=fx)(torch.randn(2, 4))
    (entry,) = fx.reports[0].entries
    assert (entry.accesses, entry.evaluations) == (4, 1)


def test_the_name_of_a_tensor_that_a_function_closes_over() -> None:
    def solve(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return function(function(x))

    layers = nn.ModuleDict({"cell": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    fx = fxparam.backend("eager")
    torch.compile(solve, backend=fx)(lambda x: layers["cell"](x), torch.randn(2, 4))
    assert [e.name for report in fx.reports for e in report.entries] == ["cell.weight"]


def test_a_statistic_that_batch_norm_writes_between_two_accesses() -> None:
    class Between(Loop):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.cell(x)
            self.cell.parametrizations.weight[0].norm(3 * x)
            return first - self.cell(x)

    model, x = Between(_register(_ScalesByStatistic)), torch.randn(4, 5, dtype=torch.float64)
    assert model(x).abs().sum() > 0
    check_against_eager(model, backend("aot_eager"), x)


class _ReadsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(5, 5, dtype=torch.float64))
        register_parametrization(self, "scale", zoo.Symmetric())
        register_parametrization(self, "scale", Counting())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.scale) @ self.scale


def test_a_parametrized_buffer_is_shared() -> None:
    model = _ReadsBuffer()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend=backend("eager"))
    torch.testing.assert_close(compiled(x), model(x))
    assert counted(lambda: compiled(x)) == (1, 0)


class _Tied(nn.Module):
    """One parametrized module reached by two paths, inside a shared block."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(5, 5, dtype=torch.float64), nn.Tanh())
        register_parametrization(block[0], "weight", Counting())
        self.first, self.second = block, nn.Sequential(block, nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_tied_modules_share() -> None:
    model, x = _Tied(), torch.randn(2, 5, dtype=torch.float64)
    check_against_eager(model, backend("aot_eager"), x)
    compiled = torch.compile(model, backend=backend("eager"))
    compiled(x)
    assert counted(lambda: compiled(x).sum().backward()) == (1, 1)


def test_a_frame_resumed_after_a_graph_break_shares_too() -> None:
    class Broken(Loop):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return self.cell(self.cell(x))

    model, x = Broken(_register(Counting)), torch.randn(2, 5, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend("eager"))
    compiled(x)
    assert counted(lambda: compiled(x).sum().backward()) == (2, 2)


class _Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(5, 5)
        register_parametrization(self.cell, "weight", helpers.MatrixExponential())
        register_parametrization(self.cell, "weight", Counting())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.cell(x)
        x = self.cell(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.cell(x)
        return self.cell(x.float())


def test_modes_do_not_mix_and_are_left_again() -> None:
    model, x = _Modes(), torch.randn(2, 5)
    compiled = torch.compile(model, backend=backend("eager"))
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    # no_grad, grad (before and after autocast), autocast
    assert counted(lambda: compiled(x).sum().backward()) == (3, 2)


def test_functional_call_with_other_originals_shares_them() -> None:
    model, x = Loop(_register(Counting)), torch.randn(2, 5, dtype=torch.float64)
    name = "cell.parametrizations.weight.original"

    @torch.compile(backend=backend("eager"))
    def run(original: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: original}, (x,))

    other = torch.randn(5, 5, dtype=torch.float64)
    expected = torch.func.functional_call(model, {name: other}, (x,))
    torch.testing.assert_close(run(other), expected)
    assert counted(lambda: run(other)) == (1, 0)


def test_dynamic_shapes() -> None:
    fx = backend("aot_eager")
    model = Loop(_register(zoo.Symmetric))
    compiled = torch.compile(model, backend=fx, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 5, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert fx.last_report.entries[0].evaluations == 1


def test_a_graph_without_parametrizations_passes_untouched() -> None:
    seen = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm.print_readable(print_output=False))
        return gm

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(2, 3)
    torch.compile(model, backend=inner)(x)
    torch.compiler.reset()
    torch.compile(model, backend=backend(inner))(x)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("options", [{"max_autotune": False}, None])
def test_mode_and_options_reach_inductor(options: Any) -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    mode = None if options else "max-autotune-no-cudagraphs"
    compiled = torch.compile(model, backend="fxparam", mode=mode, options=options)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_wrong_option_is_inductors_own_error() -> None:
    compiled = torch.compile(nn.Linear(3, 3), backend="fxparam", options={"no_such": 1})
    with pytest.raises(Exception, match="no_such"):
        compiled(torch.randn(2, 3))


def test_unknown_inner_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'no_such'.*inductor"):
        backend("no_such")
    with pytest.raises(TypeError, match="int"):
        backend(3)  # type: ignore[arg-type]


def test_options_are_handed_to_a_callable_inner() -> None:
    got: dict[str, Any] = {}

    def inner(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        got.update(kwargs)
        return gm

    torch.compile(nn.Linear(3, 3), backend=Backend(inner, None, {"a": 1}))(torch.randn(1, 3))
    assert got == {"options": {"a": 1}}


def test_a_parametrization_that_raises_midway_raises_as_in_eager() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 5 and self.training:
                raise ValueError("no such weight")
            return x

    model = Loop(lambda cell: register_parametrization(cell, "weight", Raises(), unsafe=True))
    compiled = torch.compile(model, backend=backend("eager"))
    with pytest.raises(ValueError, match="no such weight"):
        compiled(torch.randn(2, 5, dtype=torch.float64))
    model.eval()
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_tensor_keeps_its_name_where_traced_code_changes_its_module() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 4))

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.eval()
        return model(model(x))  # type: ignore[no-any-return]

    fx = backend("eager")
    torch.compile(run, backend=fx)(model, torch.ones(1, 4))
    (entry,) = fx.last_report.entries
    assert (entry.name, entry.kind, entry.runs_before, entry.runs) == (
        "model.weight",
        ("_WeightNorm",),
        2,
        1,
    )


def test_a_slice_of_a_module_list_switches_no_mode() -> None:
    """It makes a new ``ModuleList``, which torch logs by a call in the graph."""
    layer = register_parametrization(nn.Linear(3, 3), "weight", Counting())
    layers = nn.ModuleList([nn.Linear(3, 3), layer])

    def twice(x: Tensor) -> Tensor:
        for layer in layers[1:]:
            x = layer(x)
        for layer in layers[1:]:
            x = layer(x)
        return x

    torch.compiler.reset()
    compiled = torch.compile(twice, backend=fxparam.backend("eager"), fullgraph=True)
    assert counted(lambda: compiled(torch.randn(2, 3))) == (1, 0)
