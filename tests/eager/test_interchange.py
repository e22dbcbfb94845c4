"""Modules parametrized here and through torch go through each other's functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo
from tests.zoo import build

WRAPS = [orthogonal, spectral_norm, weight_norm]
APIS = {"ours": ours, "torch": torch_parametrize}


@pytest.fixture(params=["ours", "torch"])
def made_by(request: pytest.FixtureRequest) -> Any:
    return APIS[request.param]


@pytest.fixture(params=["ours", "torch"])
def used_by(request: pytest.FixtureRequest) -> Any:
    return APIS[request.param]


def test_the_same_state_dict() -> None:
    mine, theirs = build(ours), build(torch_parametrize)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in mine.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in theirs.named_modules()]
    for a, b in ((mine, theirs), (theirs, mine)):
        with torch.no_grad():
            for parameter in a.parameters():
                parameter.uniform_()
        b.load_state_dict(a.state_dict())
        assert_close(a[0].weight, b[0].weight)
        assert_close(a[0].bias, b[0].bias)


def test_our_list_is_one_of_torch() -> None:
    assert issubclass(ours.ParametrizationList, torch_parametrize.ParametrizationList)
    layer = ours.register_parametrization(zoo.linear(), "weight", zoo.Double())
    assert type(layer.parametrizations.weight) is ours.ParametrizationList


def test_each_recognises_the_other(made_by: Any, used_by: Any) -> None:
    model = build(made_by)
    layer = model[0]
    assert used_by.is_parametrized(layer) and used_by.is_parametrized(layer, "weight")
    assert not used_by.is_parametrized(layer, "in_features") and not used_by.is_parametrized(model)
    assert used_by.type_before_parametrizations(layer) is nn.Linear
    assert used_by.type_before_parametrizations(model) is nn.Sequential


@pytest.mark.parametrize("leave_parametrized", [True, False])
def test_each_removes_from_the_other(made_by: Any, used_by: Any, leave_parametrized: bool) -> None:
    layer = build(made_by)[0]
    original = layer.parametrizations.weight.original
    expected = (layer.weight if leave_parametrized else original).detach().clone()
    used_by.remove_parametrizations(layer, "weight", leave_parametrized)
    assert layer.weight is original and torch.equal(layer.weight, expected)
    assert used_by.is_parametrized(layer, "bias") and layer.bias.grad_fn is not None
    used_by.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear and not hasattr(layer, "parametrizations")


def test_each_registers_on_the_other(made_by: Any, used_by: Any) -> None:
    layer = made_by.register_parametrization(zoo.linear(), "weight", zoo.Symmetric())
    used_by.register_parametrization(layer, "weight", zoo.Double())
    used_by.register_parametrization(layer, "bias", zoo.Double())
    layer.weight, layer.bias = torch.eye(3), torch.ones(3)
    assert_close(layer(torch.eye(3)), torch.eye(3) + 1)
    for name in ("weight", "bias"):
        made_by.remove_parametrizations(layer, name)
    assert type(layer) is nn.Linear


def test_each_transfers_from_the_other(made_by: Any, used_by: Any) -> None:
    layer, target = build(made_by)[0], zoo.linear()
    used_by.transfer_parametrizations_and_params(layer, target)
    assert_close(target.weight, layer.weight)
    assert_close(target.bias, layer.bias)


@pytest.mark.parametrize("wrap", WRAPS)
def test_torch_parametrizations_are_recognised(wrap: Any) -> None:
    layer = wrap(nn.Linear(3, 4))
    assert ours.is_parametrized(layer, "weight")
    assert ours.type_before_parametrizations(layer) is nn.Linear
    ours.remove_parametrizations(layer.eval(), "weight")
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("wrap", WRAPS)
def test_torch_parametrizations_on_our_modules(wrap: Any) -> None:
    layer = ours.register_parametrization(nn.Linear(3, 4), "bias", zoo.Double())
    sibling = ours.register_parametrization(nn.Linear(3, 4), "bias", zoo.Double())
    reference = copy.deepcopy(nn.Linear(3, 4))
    with torch.no_grad():
        reference.weight.copy_(layer.weight)
    rng = torch.get_rng_state()
    wrap(layer)
    torch.set_rng_state(rng)
    wrap(reference)
    assert_close(layer.eval().weight, reference.eval().weight)
    assert sibling.weight.is_leaf
    with ours.cached():
        assert layer.weight is layer.weight
    ours.adopt(layer)
    assert type(layer.parametrizations.weight) is ours.ParametrizationList


def test_through_our_functions_in_the_place_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in torch_parametrize.__all__:
        monkeypatch.setattr(torch_parametrize, name, getattr(ours, name))
    for wrap in WRAPS:
        layer = wrap(nn.Linear(3, 4)).eval()
        assert type(layer.parametrizations.weight) is ours.ParametrizationList
        with torch_parametrize.cached():
            assert layer.weight is layer.weight
        value = layer.weight.detach().clone()
        torch_parametrize.remove_parametrizations(layer, "weight")
        assert_close(layer.weight.detach(), value)


def test_functional_call_names_the_value_or_the_original(made_by: Any) -> None:
    layer = made_by.register_parametrization(zoo.linear(), "weight", zoo.Double())
    x, zeros = torch.ones(1, 3), torch.zeros(3)
    call = torch.func.functional_call
    original = {"parametrizations.weight.original": torch.eye(3), "bias": zeros}
    assert_close(call(layer, original, x), 2 * x)


def test_a_module_hook_sees_the_owner(made_by: Any) -> None:
    layer = zoo.linear()
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: seen.append(module.weight))
    made_by.register_parametrization(layer, "weight", zoo.Symmetric())
    layer(torch.ones(1, 3))
    assert_close(seen[0], layer.weight)
