"""``switch``, a branch for each of several numbers, which torch has since 2.14."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from fxparam.graph.torch_bugs.memory_of_results import show_what_bodies_pass_on
from tests import helpers
from tests.bodies import Cell

switch: Any = pytest.importorskip("torch._higher_order_ops.switch").switch

Branches = tuple[Callable[[Tensor], Tensor], ...]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()  # all models have one forward, whose compilations are limited


def _model(branches: Callable[[Cell], Branches], outside: bool = False) -> Cell:
    """Three calls of a switch; its number is how many elements of the input are at least one."""

    def body(m: Cell, x: Tensor) -> Tensor:
        number = (x >= 1).sum()
        x = m.step(x) if outside else x
        for _ in range(3):
            x = switch(number, branches(m), (x,))
        return x

    return Cell(body)


def _input(number: int) -> Tensor:
    x = torch.zeros(3, 3, dtype=torch.float64)
    x[0, :number] = 1
    return x


def _each_reads(m: Cell) -> Branches:
    weight = lambda: m.cell.weight  # noqa: E731
    return m.step, lambda x: m.step(x) @ weight(), lambda x: torch.sinh(weight() @ x)


def _one_reads(m: Cell) -> Branches:
    return m.step, lambda x: x * 2, torch.sinh


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_weight_that_each_branch_reads_is_evaluated_once(inner: str, number: int) -> None:
    torch.manual_seed(0)
    model, x = _model(_each_reads), _input(number)
    helpers.check_against_eager(model, fxparam.backend(inner), x)
    compiled = torch.compile(model, backend=fxparam.backend(inner))
    compiled(x)
    assert helpers.counted(lambda: compiled(x).sum().backward()) == (1, 1)
    # torch runs a branch again in backward.
    assert helpers.counted(lambda: model(x).sum().backward()) == (
        (12, 6) if number == 1 else (6, 3)
    )


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("outside", [False, True])
def test_a_weight_that_one_branch_reads(number: int, outside: bool) -> None:
    torch.manual_seed(0)
    model, x = _model(_one_reads, outside), _input(number)
    # aot_eager refuses a gradient of matrix_exp, a part of a larger one, beside another's zeros.
    backend = fxparam.backend("aot_eager" if outside else "eager")
    helpers.check_against_eager(model, backend, x)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    runs = helpers.counted(lambda: compiled(x).sum().backward())
    # Rule 6: unless it is evaluated outside anyway, it stays where it may not run.
    assert runs == ((1, 1) if outside else (6, 3) if number == 0 else (0, 0))


def test_effects_stay_in_their_branch() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + torch.rand(()))

    def branches(m: Cell) -> Branches:
        return m.step, lambda x: m.step(x) + 1

    model = _model(branches)
    parametrize.register_parametrization(model.cell, "weight", Noise())
    backend = fxparam.backend("eager")
    helpers.check_against_eager(model, backend, _input(1))
    assert backend.last_report is not None
    assert "rule 5" in repr(backend.last_report)


def test_branches_whose_gradients_have_different_strides() -> None:
    def branches(m: Cell) -> Branches:
        return lambda x: x * m.cell.weight, lambda x: x * m.cell.weight.mT, lambda x: x + 1

    for number in range(3):
        helpers.check_against_eager(
            _model(branches, outside=True), fxparam.backend("aot_eager"), _input(number)
        )


def test_a_branch_returns_copies_of_its_operands() -> None:
    """Inductor would overwrite the operand, as in ``cond``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda x, i: switch(i, (torch.sin, lambda x: x + 0), (x,)))(
        torch.ones(3), torch.tensor(1)
    )
    bodies = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule) and m is not gm]
    (added,) = (n for m in bodies for n in m.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    added.replace_all_uses_with(added.args[0])
    show_what_bodies_pass_on(gm.graph)
    for body in bodies:
        (returned,) = body.graph.output_node().all_input_nodes
        assert returned.op == "call_function"
