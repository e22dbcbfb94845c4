"""Sharing does not ask who computes a value: weights that belong to no parametrization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from tests import helpers
from tests.helpers import check_against_eager

counted = torch.ops.fxparam_test.count


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _evaluations(model: nn.Module, x: Tensor, *, train: bool = True) -> tuple[int, int]:
    compiled = torch.compile(copy.deepcopy(model), backend=fxparam.backend("aot_eager"))

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = compiled(x)
        if train:
            out.square().sum().backward()

    step()
    return helpers.counted(step)


class Sharded(nn.Linear):
    """A linear layer whose parameters are read through properties that gather them."""

    weight_reads = 0

    @property
    def weight(self) -> Tensor:
        return counted(self._parameters["weight"])

    @property
    def bias(self) -> Tensor:
        return counted(self._parameters["bias"])


def _sharded(size: int) -> Sharded:
    # As FSDP by parametrization does it: a class with properties is put over the module's own.
    layer = nn.Linear(size, size, dtype=torch.float64)
    layer.__class__ = Sharded
    return layer  # type: ignore[return-value]


class ShardedModel(nn.Module):
    """Fourteen reads of five parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _sharded(3), _sharded(3)
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.float64))

    @property
    def gathered_scale(self) -> Tensor:
        return counted(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return x * self.gathered_scale + self.gathered_scale


@pytest.mark.parametrize("train", [True, False])
def test_reads_of_gathered_parameters_are_gathered_once(train: bool) -> None:
    model, x = ShardedModel(), torch.randn(2, 3, dtype=torch.float64)
    assert helpers.counted(lambda: model(x))[0] == 14
    assert _evaluations(model, x, train=train) == (5, 5 if train else 0)
    torch.compiler.reset()
    check_against_eager(model, fxparam.backend("aot_eager"), x)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return counted(x.detach() * x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.fxparam_test.count_backward(2 * x * grad)


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Squared.apply(x)


class Outer(nn.Module):
    """A parametrization whose own weight is parametrized."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5, bias=False, dtype=torch.float64)
        parametrize.register_parametrization(self.mix, "weight", helpers.MatrixExponential())
        parametrize.register_parametrization(self.mix, "weight", helpers.Counting())

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


CHAINS: dict[str, Callable[[], nn.Module]] = {"autograd.Function": ByFunction, "nested": Outer}


@pytest.mark.parametrize("chain", CHAINS)
def test_evaluations_with_inner_graphs_are_shared(chain: str) -> None:
    model = helpers.Loop(
        lambda m: parametrize.register_parametrization(m, "weight", CHAINS[chain]())
    )
    x = torch.randn(2, 5, dtype=torch.float64)
    assert _evaluations(model, x) == (1, 1)
    torch.compiler.reset()
    check_against_eager(model, fxparam.backend("aot_eager"), x)


class Raw(nn.Module):
    """An unconstrained parameter behind a constraint, reached through two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ counted(nn.functional.softplus(self.raw)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Raw(), Raw()
        self.other.raw = self.one.raw

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.other.raw = nn.Parameter(self.one.raw.detach().clone())


@pytest.mark.parametrize(("model", "left"), [(Tied, 1), (Untied, 2)])
def test_one_parameter_through_two_modules(model: type[nn.Module], left: int) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    assert _evaluations(model(), x) == (left, left)
    torch.compiler.reset()
    check_against_eager(model(), fxparam.backend("aot_eager"), x)


def test_frames_resumed_after_a_graph_break_share() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3, dtype=torch.float64)
            parametrize.register_parametrization(self.cell, "weight", helpers.Counting())

        def forward(self, x: Tensor) -> Tensor:
            x = self.cell(self.cell(x))
            torch._dynamo.graph_break()
            return self.cell(self.cell(x))

    assert _evaluations(Broken(), torch.randn(2, 3, dtype=torch.float64)) == (2, 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_style_weight_norm_hooks() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.utils.weight_norm(nn.Linear(3, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.cell(self.cell(x)))

    fx, x, grads = fxparam.backend("aot_eager"), torch.randn(2, 3, dtype=torch.float64), []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend=fx)):
        torch.manual_seed(0)
        model = Old()  # cannot be copied
        wrap(model)(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    assert fx.last_report is not None and fx.last_report.merged > 0


def test_the_pure_part_of_an_impure_chain_is_shared() -> None:
    model = helpers.Loop(lambda m: None)
    for step in (helpers.Counting(), helpers.RandomMask()):
        parametrize.register_parametrization(model.cell, "weight", step)
    assert _evaluations(model, torch.randn(2, 5, dtype=torch.float64)) == (1, 1)


def test_functional_call_with_other_tensors() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3, dtype=torch.float64)
            parametrize.register_parametrization(self.cell, "weight", helpers.Counting())

        def forward(self, x: Tensor) -> Tensor:
            other = {"parametrizations.weight.original": x[:3] * 2}
            for _ in range(3):
                x = torch.func.functional_call(self.cell, other, (x,))
            return self.cell(x) + self.cell(x)

    x = torch.randn(4, 3, dtype=torch.float64)
    assert _evaluations(Called(), x) == (2, 1)
    torch.compiler.reset()
    check_against_eager(Called(), fxparam.backend("aot_eager"), x)


def test_values_larger_than_max_bytes_are_not_shared() -> None:
    model = helpers.Loop(
        lambda m: parametrize.register_parametrization(m, "weight", helpers.Counting())
    )
    for limit, merged in ((8 * 25, True), (8 * 25 - 1, False)):
        torch.compiler.reset()
        fx = fxparam.backend("aot_eager", max_bytes=limit)
        torch.compile(copy.deepcopy(model), backend=fx)(torch.randn(2, 5, dtype=torch.float64))
        assert fx.last_report is not None and (fx.last_report.merged > 0) is merged
