"""Export: the same program as torch's, each parametrized tensor evaluated once, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam
from fxparam.graph.passes.naming import Step
from tests import bodies, helpers
from tests.exporting import programs
from tests.exporting.programs import (
    Cell,
    counting,
    counts_itself,
    ours,
    random_mask,
    runs_equal,
    saved_and_loaded,
    x_of,
)

pytestmark = programs.IGNORED


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def nested(m: Any, name: str) -> None:
    """A parametrization of an original."""
    counting(m, name)
    parametrize.register_parametrization(m.parametrizations[name], "original", _Symmetric())


def nested_random_mask(m: Any, name: str) -> None:
    random_mask(m, name)
    parametrize.register_parametrization(m.parametrizations[name], "original", _Symmetric())


class _Calls(nn.Module):
    """Another function at each evaluation, as attributes that no graph shows tell it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        self.log.append(self.calls)
        return x * self.calls * len(self.log)


def counts_in_python(m: nn.Module, name: str) -> None:
    parametrize.register_parametrization(m, name, _Calls(), unsafe=True)


WRAPS = [counting, ours, orthogonal, spectral_norm, weight_norm, random_mask, counts_itself]
WRAPS += [nested, nested_random_mask]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_equals_eager(wrap: Any, training: bool, strict: bool) -> None:
    model = Cell(wrap).train(training)
    classes = [type(m) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    program = fxparam.export(model, (x_of(),), strict=strict)
    program.validate()
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model.state_dict(), before)
    assert list(program.state_dict) == list(
        torch.export.export(model, (x_of(),), strict=strict).state_dict
    )
    assert not fxparam.hoist(program.graph_module).modified
    runs_equal(program, model, x_of())
    runs_equal(saved_and_loaded(program), model, x_of())
    runs_equal(program.run_decompositions(), model, x_of())


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_one_evaluation_forward_and_one_backward(strict: bool) -> None:
    model = Cell(counting)
    run = fxparam.export(model, (x_of(),), strict=strict).module()
    assert helpers.counted(lambda: run(x_of()).sum().backward()) == (1, 1)


@pytest.mark.parametrize("wrap", [random_mask, nested_random_mask, counts_itself, spectral_norm])
def test_evaluations_with_effects_are_all_there(wrap: Any) -> None:
    model = Cell(wrap)
    ours, torchs = fxparam.export(model, (x_of(),)), torch.export.export(model, (x_of(),))

    def effects(program: ExportedProgram) -> list[str]:
        targets = [str(node.target) for node in program.graph.nodes]
        return [t for t in targets if t.startswith(("aten.dropout", "aten.add_", "wrap"))]

    assert effects(ours) == effects(torchs)


def test_capture_does_not_evaluate_at_each_access() -> None:
    """What is traced, by a parametrization that says when Python runs it."""
    seen: list[int] = []

    class Seen(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            # torch.export puts another tensor in the place of each buffer while it traces.
            self.register_buffer("scale", torch.full((), 2.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(1)
            return x.tanh() * self.scale

    for api in (fxparam, parametrize):
        model = Cell(
            lambda m, name, api=api: api.register_parametrization(m, name, Seen()), steps=9
        )
        seen.clear()
        fxparam.export(model, (x_of(),))
        assert len(seen) == 1


class _WritesValue(Cell):
    def forward(self, x: Tensor) -> Tensor:
        w = self.cell.weight_hh
        v = self.cell.weight_hh
        w.mul_(2)
        return x @ w + x @ v


class _Returns(Cell):
    def forward(self, x: Tensor) -> Any:
        return self.cell.weight_hh, x @ self.cell.weight_hh


@pytest.mark.parametrize("wrap", [counting, nested])
@pytest.mark.parametrize("kind", [_WritesValue, _Returns])
def test_where_sharing_while_tracing_was_wrong(kind: Any, wrap: Any) -> None:
    model = kind(wrap).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    program = fxparam.export(model, (x_of(),))
    runs_equal(program, model, x_of())
    assert sum("count" in str(n.target) for n in program.graph.nodes) == 2


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_evaluations_that_change_attributes_are_traced_one_by_one(strict: bool) -> None:
    model, x = Cell(counts_in_python).eval(), x_of()
    expected, actual = (
        export(copy.deepcopy(model), (x,), strict=strict).module()(x)
        for export in (torch.export.export, fxparam.export)
    )
    torch.testing.assert_close(actual, expected)


class _Parts(nn.Module):
    """Modules called twice, in modules, with values of their own that come to the front."""

    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.cells = nn.Sequential(Cell(wrap, steps=1), nn.Tanh(), Cell(wrap, steps=2))
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.cells(x.sin()) * self.scale.exp()
        return self.cells[2](y) @ self.cells[0].cell.weight_hh


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_unflattens_into_modules(wrap: Any, training: bool) -> None:
    model = _Parts(wrap).train(training)
    x = x_of()
    for made_by in (torch.export.export, fxparam.export):
        program = made_by(copy.deepcopy(model), (x,))
        run, twin = torch.export.unflatten(program), copy.deepcopy(model)
        torch.manual_seed(0)
        expected = twin(x)
        torch.manual_seed(0)
        torch.testing.assert_close(run(x), expected)


class _Thrice(nn.Module):
    """A module of the root, called where its evaluations are cut in pieces."""

    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = wrap(nn.Linear(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


@pytest.mark.parametrize(
    "wrap",
    [
        partial(orthogonal, orthogonal_map="householder"),
        spectral_norm,
        lambda layer: spectral_norm(weight_norm(layer)),
    ],
    ids=["householder", "spectral norm", "spectral and weight norm"],
)
def test_unflattens_evaluations_in_pieces(wrap: Any) -> None:
    model = _Thrice(wrap)
    run = torch.export.unflatten(fxparam.export(copy.deepcopy(model), (x_of(),)))
    x = x_of()
    torch.testing.assert_close(run(x), model(x))


def test_unflattens_what_a_body_evaluated_at_random() -> None:
    """Non-strict export says of no node in a body which module it is in."""

    class OverRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4, dtype=torch.float64)
            random_mask(self.cell, "weight")

        def forward(self, x: Tensor) -> Tensor:
            return torch_map(lambda row: self.cell(row) + 1, x.sin())

    model, x = OverRows(), x_of()
    run = torch.export.unflatten(fxparam.export(model, (x,)))
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(run(x), expected)


def test_a_failed_export_leaves_no_hook() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    hooks = nn.modules.module._global_buffer_registration_hooks
    before = dict(hooks)
    with pytest.raises(Exception, match="data-dependent|guard"):
        fxparam.export(Fails(), (x_of(),))
    assert dict(hooks) == before


def test_in_a_region_of_the_user() -> None:
    model = Cell(ours)
    fxparam.adopt(model)
    with fxparam.cached():
        first = model.cell.weight_hh
        program = fxparam.export(model, (x_of(),))
        assert model.cell.weight_hh is first
    runs_equal(program, model, x_of())
    assert helpers.counted(lambda: program.module()(x_of()))[0] == 1


@pytest.mark.parametrize(
    "body",
    [bodies.in_a_scan, bodies.in_a_map, bodies.in_both_branches, bodies.in_a_while],
    ids=lambda body: body.__name__,
)
def test_out_of_bodies(body: Any) -> None:
    model = bodies.Cell(body).eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        program = fxparam.export(model, (x,))
        runs_equal(program, model, x)
        assert helpers.counted(lambda: program.module()(x))[0] == 1
        folded = fxparam.fold(program)
        runs_equal(folded, model, x)
    assert sorted(folded.state_dict) == ["cell.bias", "cell.weight", "state"]
    torch.testing.assert_close(torch.export.unflatten(program)(x), model(x))


def test_dynamic_shapes_keywords_and_mutations_survive() -> None:
    class Counts(Cell):
        def __init__(self) -> None:
            super().__init__(counting)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("offset", torch.ones(4, dtype=torch.float64), persistent=False)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x * scale * self.calls + self.offset)

    model = Counts().eval()
    shapes = {"x": {0: Dim("batch")}, "scale": None}
    kwargs = {"scale": torch.tensor(2.0)}
    for fold in (False, True):
        program = fxparam.export(model, (x_of(),), kwargs, dynamic_shapes=shapes, fold=fold)
        for each in (program, saved_and_loaded(program)):
            runs_equal(each, model, x_of(7), **kwargs)
        signature = program.run_decompositions().graph_signature
        assert list(signature.buffers_to_mutate.values()) == ["calls"]


def test_names_and_the_prologue() -> None:
    program = fxparam.export(Cell(counting), (x_of(),))
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [n.name for n in calls[:2]] == ["matrix_exp", "cell_weight_hh"]
    assert [n.meta["fxparam"] for n in calls[:2]] == [
        Step("cell.weight_hh", 0),
        Step("cell.weight_hh", 1),
    ]


def test_errors_are_those_of_torch() -> None:
    model = Cell(counting)
    with pytest.raises(Exception, match="Expecting `args` to be a tuple") as ours:
        fxparam.export(model, [x_of()])
    with pytest.raises(Exception, match="Expecting `args` to be a tuple") as theirs:
        torch.export.export(model, [x_of()])
    assert type(ours.value) is type(theirs.value)
    assert any("torch.export.export" in note for note in ours.value.__notes__)


@pytest.mark.parametrize("fold", [False, True])
def test_ahead_of_time_inductor(fold: bool, tmp_path: Any) -> None:
    model, x = Cell(orthogonal).eval(), x_of()
    with torch.no_grad():
        program = fxparam.export(model, (x,), fold=fold)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(run(x), model(x))


class _Normed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = x.norm()
        return x / norm


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_a_parametrization_with_a_no_grad_block_in_it(fold: bool, strict: bool) -> None:
    model = Cell(lambda m, name: parametrize.register_parametrization(m, name, _Normed()))
    x = torch.randn(2, 4, dtype=torch.float64)
    program = fxparam.export(model, (x,), fold=fold, strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


class _Rebinding(nn.Module):
    """Counts its evaluations in a buffer that it binds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n = self.n + 1
        return x * self.n


def test_evaluations_that_rebind_a_buffer_are_traced_one_by_one() -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    fxparam.register_parametrization(layer, "weight", _Rebinding(), unsafe=True)
    model, x = nn.Sequential(layer, layer), torch.randn(2, 3, dtype=torch.float64)
    expected = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(fxparam.export(model, (x,)).module()(x), expected)


class _CallsItself(Cell):
    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        x = x @ self.cell.weight_hh
        return self(x, False) if again else x


def test_attributes_that_change_before_a_model_calls_itself() -> None:
    model, x = _CallsItself(counts_in_python), x_of()
    program = fxparam.export(copy.deepcopy(model), (x,))
    expected = torch.export.export(copy.deepcopy(model), (x,)).module()(x)
    torch.testing.assert_close(program.module()(x), expected)


class _StraightThrough(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (torch.round(4 * x) / 4 - x).detach()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_detach_in_a_parametrization_stays(strict: bool) -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    fxparam.register_parametrization(layer, "weight", _StraightThrough())
    model, x = nn.Sequential(layer, layer), torch.randn(2, 3, dtype=torch.float64)
    original = layer.parametrizations.weight.original
    (expected,) = torch.autograd.grad(model(x).sum(), original)
    program = fxparam.export(model, (x,), strict=strict).module()
    program(x).sum().backward()
    (actual,) = (p.grad for n, p in program.named_parameters() if n.endswith("original"))
    torch.testing.assert_close(actual, expected)
