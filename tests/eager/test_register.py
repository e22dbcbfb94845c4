"""The contract of registration, assignment and removal, row by row, ours beside torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo

NAMES = (
    "register_parametrization",
    "remove_parametrizations",
    "cached",
    "is_parametrized",
    "ParametrizationList",
    "type_before_parametrizations",
    "transfer_parametrizations_and_params",
)


@pytest.fixture(params=["ours", "torch"])
def api(request: pytest.FixtureRequest) -> ModuleType:
    """Every row is walked with torch's functions too: that it is their contract is checked."""
    return ours if request.param == "ours" else torch_parametrize


@pytest.fixture(params=[False, True], ids=["set", "swap"])
def swap(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_every_name_is_there() -> None:
    assert all(hasattr(ours, name) for name in NAMES)
    assert set(torch_parametrize.__all__) <= set(ours.__all__)
    for name in NAMES:
        assert getattr(ours, name) is not getattr(torch_parametrize, name)


# --- registration -----------------------------------------------------------------------------


def test_a_parameter(api: Any, swap: bool) -> None:
    layer = zoo.linear()
    weight, value = layer.weight, layer.weight.detach().clone()
    assert api.register_parametrization(layer, "weight", zoo.Symmetric()) is layer
    chain = layer.parametrizations.weight
    assert chain.original is weight
    assert isinstance(weight, nn.Parameter) and weight.requires_grad
    assert_close(weight.detach(), value.triu())
    assert_close(layer.weight, value.triu() + value.triu(1).mT)
    assert "weight" not in layer._parameters
    assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
    layer.weight.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer(api: Any, swap: bool, persistent: bool) -> None:
    module = zoo.WithBuffer(torch.ones(3), persistent)
    table = module.table
    api.register_parametrization(module, "table", zoo.Double())
    assert module.parametrizations.table.original is table
    assert not isinstance(table, nn.Parameter)
    assert_close(module.table, torch.ones(3))
    assert_close(table, torch.full((3,), 0.5))
    # Also where it was not persistent: a parametrized buffer is in the state dict.
    assert list(module.state_dict()) == ["parametrizations.table.original"]
    api.remove_parametrizations(module, "table")
    assert module.table is table and "table" in module._buffers
    assert list(module.state_dict()) == ["table"]


def test_a_chain(api: Any) -> None:
    layer = zoo.linear()
    value = layer.weight.detach().clone()
    first, second = zoo.Double(), zoo.Skew()
    api.register_parametrization(layer, "weight", first)
    api.register_parametrization(layer, "weight", second)
    chain = layer.parametrizations.weight
    assert list(chain) == [first, second] and len(chain) == 2
    assert chain[0] is first and chain[1] is second and chain[-1] is second
    assert_close(layer.weight, value.tril(-1) - value.tril(-1).mT)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_several_originals(api: Any, swap: bool, terms: int) -> None:
    layer = zoo.linear()
    value = layer.weight.detach().clone()
    api.register_parametrization(layer, "weight", zoo.Sum(terms))
    chain = layer.parametrizations.weight
    names = [f"original{i}" for i in range(terms)]
    assert list(chain._parameters) == names
    assert not hasattr(chain, "original") and not hasattr(chain, f"original{terms}")
    assert (chain.is_tensor, chain.ntensors, chain.unsafe) == (False, terms, False)
    assert_close(layer.weight, value)
    api.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter) and type(layer) is nn.Linear
    assert_close(layer.weight.detach(), value)


@pytest.mark.parametrize("parametrization", [zoo.Double, zoo.Sum, zoo.Skew])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_kept(api: Any, parametrization: Any, requires_grad: bool) -> None:
    layer = zoo.linear()
    layer.weight.requires_grad_(requires_grad)
    api.register_parametrization(layer, "weight", parametrization())
    assert all(p.requires_grad == requires_grad for p in layer.parametrizations.parameters())
    assert layer.weight.requires_grad == requires_grad


def test_right_inverse_may_be_absent_or_not_implemented(api: Any) -> None:
    class Refuses(zoo.Skew):
        def right_inverse(self, y: Tensor) -> Tensor:
            raise NotImplementedError

    for parametrization in (zoo.Skew(), Refuses()):
        layer = zoo.linear()
        value = layer.weight.detach().clone()
        api.register_parametrization(layer, "weight", parametrization)
        assert_close(layer.parametrizations.weight.original.detach(), value)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_taken_over(api: Any, training: bool) -> None:
    layer = zoo.linear().train(training)
    parametrization = nn.Sequential(zoo.Identity().train(not training)).train(not training)
    api.register_parametrization(layer, "weight", parametrization)
    api.register_parametrization(layer, "weight", zoo.Identity().train(not training))
    assert parametrization.training is parametrization[0].training is training
    assert layer.parametrizations.weight[1].training is training


def test_unsafe_may_change_shape_and_dtype(api: Any) -> None:
    class FirstRowDouble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1].double()

    layer = zoo.linear()
    api.register_parametrization(layer, "weight", FirstRowDouble(), unsafe=True)
    assert layer.weight.shape == (1, 3) and layer.weight.dtype == torch.float64
    assert layer.parametrizations.weight.unsafe
    # Once unsafe, always: the flag is about the chain.
    api.register_parametrization(layer, "weight", zoo.Identity())
    assert layer.parametrizations.weight.unsafe


def test_unsafe_evaluates_nothing(api: Any) -> None:
    counted = zoo.Counted()
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", counted, unsafe=True)
    api.register_parametrization(layer, "weight", counted, unsafe=True)
    assert counted.evaluations == 0


def test_several_tensors_of_a_module(api: Any) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Double())
    cls = type(layer)
    assert cls.__name__ == "ParametrizedLinear" and cls.__bases__ == (nn.Linear,)
    api.register_parametrization(layer, "bias", zoo.Double())
    assert type(layer).__name__ == "ParametrizedLinear"
    assert api.type_before_parametrizations(layer) is nn.Linear
    assert list(layer.parametrizations) == ["weight", "bias"]
    api.remove_parametrizations(layer, "weight")
    assert api.is_parametrized(layer) and not api.is_parametrized(layer, "weight")
    assert api.type_before_parametrizations(layer) is nn.Linear
    api.remove_parametrizations(layer, "bias")
    assert type(layer) is api.type_before_parametrizations(layer) is nn.Linear
    assert not hasattr(layer, "parametrizations")


def test_a_list_made_by_hand(api: Any) -> None:
    weight = nn.Parameter(torch.eye(3))
    chain = api.ParametrizationList([zoo.Double()], weight)
    assert chain.original is weight and not chain.unsafe
    assert_close(weight.detach(), torch.eye(3) / 2)
    assert_close(chain(), torch.eye(3))
    chain.right_inverse(torch.ones(3, 3))
    assert_close(weight.detach(), torch.ones(3, 3) / 2)


# --- assignment -------------------------------------------------------------------------------


def test_assignment(api: Any, swap: bool) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Symmetric())
    api.register_parametrization(layer, "weight", zoo.Double())
    original = layer.parametrizations.weight.original
    layer.weight = torch.eye(3)
    assert layer.parametrizations.weight.original is original
    assert_close(layer.weight.detach(), torch.eye(3))
    assert_close(original.detach(), torch.eye(3) / 2)


def test_assignment_to_several_originals(api: Any, swap: bool) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Sum(3))
    before = list(layer.parametrizations.weight.parameters())
    layer.weight = torch.eye(3)
    assert all(
        a is b for a, b in zip(before, layer.parametrizations.weight.parameters(), strict=True)
    )
    assert_close(layer.weight.detach(), torch.eye(3))


def test_assignment_may_write_the_parametrization(api: Any) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Bordered(layer.weight.detach()))
    layer.weight = torch.eye(3)
    assert_close(layer.parametrizations.weight[0].base, torch.eye(3))
    assert_close(layer.weight.detach(), torch.eye(3))


def test_an_optimizer_made_before_goes_on(api: Any) -> None:
    layer = zoo.linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    api.register_parametrization(layer, "weight", zoo.Symmetric())
    for _ in range(2):
        before = layer.weight.detach().clone()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert not torch.equal(layer.weight, before)
    api.remove_parametrizations(layer, "weight")
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


# --- removal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("leave_parametrized", [True, False])
def test_removal(api: Any, swap: bool, leave_parametrized: bool) -> None:
    layer = zoo.linear()
    weight = layer.weight
    api.register_parametrization(layer, "weight", zoo.Symmetric())
    api.register_parametrization(layer, "weight", zoo.Double())
    expected = (layer.weight if leave_parametrized else weight).detach().clone()
    assert api.remove_parametrizations(layer, "weight", leave_parametrized) is layer
    assert layer.weight is weight is layer._parameters["weight"]
    assert_close(weight.detach(), expected)
    assert type(layer) is nn.Linear and set(layer.state_dict()) == {"weight", "bias"}


def test_registering_again_after_removal(api: Any) -> None:
    layer = zoo.linear()
    weight = layer.weight
    for _ in range(3):
        api.register_parametrization(layer, "weight", zoo.Symmetric())
        api.remove_parametrizations(layer, "weight")
    assert layer.weight is weight
    assert_close(weight, weight.mT)


def test_removal_may_leave_another_shape(api: Any, swap: bool) -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[[0]]

    layer = zoo.linear()
    api.register_parametrization(layer, "weight", Resize(), unsafe=True)
    api.remove_parametrizations(layer, "weight")
    assert layer.weight.shape == (1, 3)


# --- parametrized originals -------------------------------------------------------------------


def test_an_original_may_be_parametrized(api: Any) -> None:
    layer = zoo.linear()
    weight = layer.weight
    value = weight.detach().clone()
    api.register_parametrization(layer, "weight", zoo.Skew())
    chain = layer.parametrizations.weight
    api.register_parametrization(chain, "original", zoo.Symmetric())
    assert api.is_parametrized(chain, "original")
    assert isinstance(chain, api.ParametrizationList)
    symmetric = value.triu() + value.triu(1).mT
    assert_close(layer.weight, symmetric.tril(-1) - symmetric.tril(-1).mT)
    assert "parametrizations.weight.parametrizations.original.original" in layer.state_dict()
    api.remove_parametrizations(chain, "original", leave_parametrized=False)
    assert type(chain) is api.ParametrizationList and chain.original is weight
    api.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert layer.weight is weight and type(layer) is nn.Linear


def test_a_parametrized_original_is_served_in_full() -> None:
    """Assigning, appending and removing reach the stored tensor; torch's do not."""
    layer = zoo.linear()
    weight = layer.weight
    ours.register_parametrization(layer, "weight", zoo.Double())
    ours.register_parametrization(layer.parametrizations.weight, "original", zoo.Symmetric())
    layer.weight = torch.eye(3)
    assert_close(layer.weight.detach(), torch.eye(3))
    ours.register_parametrization(layer, "weight", zoo.Skew())
    assert_close(layer.weight.detach(), torch.zeros(3, 3))
    for leave_parametrized in (False, True):
        twin = copy.deepcopy(layer)
        expected = twin.weight if leave_parametrized else twin.parametrizations.weight.original
        stored = twin.parametrizations.weight.parametrizations.original.original
        ours.remove_parametrizations(twin, "weight", leave_parametrized)
        assert twin.weight is stored and "weight" in twin._parameters
        assert_close(stored.detach(), expected.detach())
    assert layer.parametrizations.weight.parametrizations.original.original is weight


@pytest.mark.parametrize("change", ["assign", "register", "remove"])
def test_hooks_on_the_gradient_of_an_original_stay(change: str) -> None:
    layer = nn.Linear(3, 3)
    original = layer.weight
    if change != "register":
        ours.register_parametrization(layer, "weight", Twice())
    node = torch.autograd.graph.get_gradient_edge(original).node
    calls: list[int] = []
    node.register_hook(lambda *_: calls.append(1))
    if change == "assign":
        layer.weight = torch.ones(3, 3)
    elif change == "register":
        ours.register_parametrization(layer, "weight", Twice())
    else:
        ours.remove_parametrizations(layer, "weight")
    layer(torch.ones(1, 3)).sum().backward()
    assert calls == [1]
    assert torch.autograd.graph.get_gradient_edge(original).node is node


def test_an_assigned_view_of_the_original() -> None:
    layer = ours.register_parametrization(nn.Linear(3, 3), "weight", nn.Identity())
    layer.parametrizations.weight[0].right_inverse = lambda value: value  # type: ignore[assignment]
    before = layer.weight.detach().clone()
    layer.weight = layer.parametrizations.weight.original.T
    assert torch.equal(layer.weight, before.T)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_tensor_that_a_parametrization_keeps_is_not_written() -> None:
    class Offset(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.base + x

        def right_inverse(self, x: Tensor) -> Tensor:
            self.base = x.detach()
            return torch.zeros_like(x)

    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    ours.register_parametrization(layer, "weight", Offset())
    assert torch.equal(layer.weight, before)
    layer.weight = torch.ones(3, 3)
    assert torch.equal(layer.weight, torch.ones(3, 3))
