"""Lowered evaluations in compiled models: results are eager's, and the report says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils.checkpoint import checkpoint

import fxparam
from tests.helpers import Loop, check_against_eager, skip_unless_scans_train

SIZE = 48


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def _wrap(kind: str, scale: float = 0.3) -> Callable[[nn.Module], None]:
    def wrap(cell: nn.Module) -> None:
        orthogonal(cell, orthogonal_map=kind)
        with torch.no_grad():  # the map starts at the identity
            cell.parametrizations.weight.original.add_(torch.randn(SIZE, SIZE) * scale)

    return wrap


OPS = {"matrix_exp": "matrix_exp", "householder": "householder_product"}
X = partial(torch.randn, 2, SIZE, dtype=torch.float64)


def _lowered(fx: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(entry.name, entry.lowered) for entry in fx.last_report.entries]


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_loop_equals_eager(kind: str, steps: int) -> None:
    fx = fxparam.backend("aot_eager")
    check_against_eager(Loop(_wrap(kind), SIZE, steps), fx, X())
    assert _lowered(fx) == [("cell.weight", (OPS[kind],))]
    assert repr(fx.last_report).endswith(f"    {OPS[kind]} lowered")


# Raised by Inductor's own code where it lowers ``diagonal``.
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")
@pytest.mark.parametrize("kind", OPS)
def test_under_inductor(kind: str) -> None:
    check_against_eager(Loop(_wrap(kind), SIZE, 2), fxparam.backend(), X(), fullgraph=True)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_equals_eager(dim: int | None, inner: str) -> None:
    layers = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
    model = nn.Sequential(*(weight_norm(layer, dim=dim) for layer in layers))
    fx, x = fxparam.backend(inner), torch.randn(2, 4, dtype=torch.float64)
    check_against_eager(model, fx, x)
    assert _lowered(fx) == [(f"{i}.weight", ("weight_norm",)) for i in range(3)]
    assert "batched" not in repr(fx.last_report)


def test_lower_false_keeps_torchs_ops() -> None:
    fx = fxparam.backend("aot_eager", lower=False)
    check_against_eager(Loop(_wrap("matrix_exp"), SIZE, 2), fx, X())
    assert _lowered(fx) == [("cell.weight", ())]
    assert "lowered" not in repr(fx.last_report)
    assert repr(fx) == "fxparam.backend('aot_eager', lower=False)"


def test_inference_is_torchs() -> None:
    model, x = Loop(_wrap("matrix_exp"), SIZE, 2), X()
    fx = fxparam.backend("aot_eager")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=fx)(x), model(x))
    assert _lowered(fx) == [("cell.weight", ())]


class _Scan(Loop):
    def forward(self, x: Tensor) -> Tensor:
        def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.cell(h) + row)
            return h, h + 0

        return torch._higher_order_ops.scan(step, x, torch.zeros(3, 1, SIZE, dtype=x.dtype))[0]


@pytest.mark.parametrize("kind", OPS)
def test_an_evaluation_that_left_a_scan(kind: str) -> None:
    skip_unless_scans_train()
    fx = fxparam.backend("aot_eager")
    check_against_eager(_Scan(_wrap(kind), SIZE), fx, X(), fullgraph=True)
    assert _lowered(fx) == [("cell.weight", (OPS[kind],))]


class _Checkpoint(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(self.cell(x)), x, use_reentrant=False)


@pytest.mark.parametrize("kind", OPS)
def test_an_evaluation_that_stays_in_a_checkpoint(kind: str) -> None:
    fx = fxparam.backend("aot_eager")
    check_against_eager(_Checkpoint(_wrap(kind), SIZE), fx, X())
    assert _lowered(fx) == [("cell.weight", (OPS[kind],))]


@pytest.mark.parametrize("kind", OPS)
def test_values_of_a_region_around_the_graph(kind: str) -> None:
    model, x = Loop(_wrap(kind), SIZE, 2), X()
    fxparam.adopt(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    for function in (model, compiled):
        with fxparam.cached(model, twin):
            (function(x) + function(2 * x)).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("kind", OPS)
def test_a_region_in_the_graph(kind: str) -> None:
    class Region(Loop):
        def forward(self, x: Tensor) -> Tensor:
            with fxparam.cached():
                return torch.tanh(self.cell(torch.tanh(self.cell(x))))

    fx = fxparam.backend("aot_eager")
    check_against_eager(Region(_wrap(kind), SIZE), fx, X())
    assert _lowered(fx) == [("cell.weight", (OPS[kind],))]


def test_transforms_in_the_graph_keep_torchs_op() -> None:
    cell = nn.Linear(SIZE, SIZE, dtype=torch.float64)
    _wrap("matrix_exp")(cell)

    def run(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: cell(x).square().sum())(x)

    fx = fxparam.backend("aot_eager")
    x = X()
    torch.testing.assert_close(torch.compile(run, backend=fx)(x), run(x))
    assert _lowered(fx) == [("cell.weight", ())]


@pytest.mark.parametrize("kind", OPS)
def test_autocast_around_and_inside(kind: str) -> None:
    cell = nn.Linear(SIZE, SIZE)
    _wrap(kind)(cell)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return cell(x) + cell.weight.sum()

    x = torch.randn(2, SIZE)
    fx = fxparam.backend("aot_eager")
    torch.testing.assert_close(torch.compile(run, backend=fx)(x), run(x), rtol=2e-2, atol=2e-2)
    ours = (OPS[kind],) if kind == "matrix_exp" else ()
    assert _lowered(fx) == [("cell.weight", ours)]


def test_a_computed_weight_that_is_read_once_is_reported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.randn(SIZE, SIZE, dtype=torch.float64) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.matrix_exp(self.raw)

    fx = fxparam.backend("aot_eager")
    check_against_eager(Model(), fx, X())
    assert _lowered(fx) == [("matrix_exp(raw)", ("matrix_exp",))]


def test_a_pass_that_fails_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("fxparam.compiling.backend.lower_ops", fails)
    model, x = Loop(_wrap("matrix_exp"), SIZE, 2), X()
    compiled = torch.compile(model, backend=fxparam.backend("aot_eager", strict=False))
    with pytest.warns(RuntimeWarning, match="compiled unshared"):
        torch.testing.assert_close(compiled(x), model(x))


def test_a_checkpoint_around_the_first_call_counts_no_tensor_of_the_passes() -> None:
    model = nn.Sequential(*(weight_norm(nn.Linear(4, 4, dtype=torch.float64)) for _ in range(3)))
    compiled = torch.compile(lambda x: model(model(x)), backend=fxparam.backend("aot_eager"))
    x, results = torch.randn(3, 4, dtype=torch.float64), []
    for run in (compiled, lambda x: model(model(x))):
        model.zero_grad()
        checkpoint(run, x, use_reentrant=False).sum().backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)
