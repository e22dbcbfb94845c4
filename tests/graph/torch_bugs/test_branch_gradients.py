"""The gradients of an operand have the same strides in every branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import fxparam
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.nesting import levels_of
from fxparam.graph.torch_bugs.branch_gradients import (
    lay_gradients_out_alike,
    with_gradient_laid_out_alike,
)
from tests import helpers
from tests.graph.torch_bugs import torch_alone


def branches(x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight is laid out as it is in one branch, transposed in the other."""
    return torch.cond(
        x.sum() > -1000, lambda x, w: x * w, lambda x, w: x * w.transpose(0, 1), (x, weight)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_alone_refuses_other_strides(backend: str) -> None:
    raised = torch_alone.message(lambda: torch_alone.error(branches, backend))
    assert not raised or "The sorted order of strides of the two branches' output" in raised
    file = "fxparam/graph/torch_bugs/branch_gradients.py"
    torch_alone.check(bool(raised), then=f"{file} may be dropped")


def test_a_branch_that_was_changed_has_one_layout() -> None:
    """The program that torch alone refuses, as if every branch of it had been changed."""
    aot_eager: Any = torch._dynamo.lookup_backend("aot_eager")

    def inner(gm: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        levels = levels_of(gm, analyze(gm))
        changed = {level.gm for level in levels if level.contexts}
        assert len(changed) == 2
        lay_gradients_out_alike(levels, changed)
        # Again, it changes nothing.
        code = [module.print_readable(print_output=False) for module in changed]
        lay_gradients_out_alike(levels, changed)
        assert code == [module.print_readable(print_output=False) for module in changed]
        for module in changed:
            module.graph.lint()
            module.recompile()
        return aot_eager(gm, inputs)

    assert torch_alone.error(branches, inner) < 1e-12


class Branches(nn.Module):
    """Both branches evaluate the same function of the weight: it is moved in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        def evaluated() -> Tensor:
            return torch.ops.fxparam_test.count(torch.sinh(self.weight))

        return torch.cond(
            x.sum() > 0,
            lambda x: x * evaluated(),
            lambda x: x * evaluated().transpose(0, 1),
            (x,),
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_moved_out_of_branches_trains(sign: int) -> None:
    model, x = Branches(), sign * torch.rand(3, 3, dtype=torch.float64)
    backend = fxparam.backend("aot_eager")
    helpers.check_against_eager(model, backend, x)
    compiled = torch.compile(model, backend=backend)
    assert helpers.counted(lambda: compiled(x).sum().backward()) == (1, 1)


def test_a_gradient_that_is_one_number_at_every_place() -> None:
    class Sums(Branches):
        def forward(self, x: Tensor) -> Tensor:
            def evaluated() -> Tensor:
                return torch.sinh(self.weight)

            return torch.cond(
                x.sum() > 0, lambda x: x @ evaluated(), lambda x: x - evaluated().sum(), (x,)
            )

    for sign in (1, -1):
        x = sign * torch.rand(3, 3, dtype=torch.float64)
        backend = fxparam.backend("aot_eager")
        helpers.check_against_eager(Sums(), backend, x)
        assert backend.last_report is not None and backend.last_report.merged > 0


def _laid_out(value: Tensor) -> tuple[GraphModule, bool]:
    """Return a graph that reads an operand as a branch would, and whether it has views for it."""
    graph = Graph()
    operand = graph.placeholder("operand")
    operand.meta["example_value"] = value
    seen = with_gradient_laid_out_alike(operand)
    graph.output(seen)
    graph.lint()
    return GraphModule({}, graph), seen is not operand


@pytest.mark.parametrize("strides", [(12, 4, 1), (12, 1, 3), (1, 2, 6), (4, 8, 1)])
def test_the_gradient_has_the_strides_of_the_operand(strides: tuple[int, int, int]) -> None:
    value = torch.randn(24).as_strided((2, 3, 4), strides).requires_grad_()
    gm, changed = _laid_out(value)
    assert changed
    out = gm(value)
    assert torch.equal(out, value)
    one = torch.randn(1).expand(2, 3, 4)  # as of a sum
    for cotangent in (torch.randn(2, 3, 4), torch.randn(4, 3, 2).permute(2, 1, 0), one):
        (gradient,) = torch.autograd.grad(out, value, cotangent, retain_graph=True)
        assert gradient.stride() == value.stride()
        assert torch.equal(gradient, cotangent)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(2, 3),  # has no gradient
        torch.randn(4, 3)[::2].requires_grad_(),  # is not dense
        torch.randn(1, 3).expand(2, 3).requires_grad_(),
    ],
    ids=["without a gradient", "not dense", "expanded"],
)
def test_other_operands_are_left_as_they_are(value: Tensor) -> None:
    assert not _laid_out(value)[1]
