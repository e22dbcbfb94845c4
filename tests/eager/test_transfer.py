"""``transfer_parametrizations_and_params``, ours beside torch's."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import nn
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo


@pytest.fixture(params=["ours", "torch"])
def api(request: pytest.FixtureRequest) -> ModuleType:
    """Every row is walked with torch's functions too: that it is their contract is checked."""
    return ours if request.param == "ours" else torch_parametrize


@pytest.mark.parametrize("parametrization", [zoo.Symmetric, zoo.Sum, zoo.Skew])
def test_transfer(api: Any, parametrization: Any) -> None:
    source, target = zoo.linear(), zoo.linear()
    api.register_parametrization(source, "weight", parametrization())
    api.register_parametrization(source, "weight", zoo.Double())
    before = source.weight.detach().clone()
    assert api.transfer_parametrizations_and_params(source, target) is target
    assert api.is_parametrized(target, "weight") and not api.is_parametrized(target, "bias")
    assert_close(target.weight, source.weight)
    assert_close(source.weight.detach(), before)
    mine, theirs = target.parametrizations.weight, source.parametrizations.weight
    assert mine is not theirs and list(mine) == list(theirs)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a is b
    with api.cached():
        assert target.weight is target.weight and target.weight is not source.weight
    api.remove_parametrizations(target, "weight")
    assert api.is_parametrized(source, "weight")


def test_transfer_of_one_tensor_and_of_a_missing_one(api: Any) -> None:
    source, target = zoo.linear(), zoo.linear()
    source.extra = nn.Parameter(torch.randn(2))
    for name in ("weight", "bias", "extra"):
        api.register_parametrization(source, name, zoo.Double())
    api.transfer_parametrizations_and_params(source, target, "extra")
    assert list(target.parametrizations) == ["extra"]
    assert_close(target.extra, source.extra)
    api.transfer_parametrizations_and_params(source, target, "bias")
    assert list(target.parametrizations) == ["extra", "bias"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("parametrization", [zoo.Double, zoo.Sum])
def test_transfer_to_a_layer_for_quantization(api: Any, parametrization: Any) -> None:
    source = zoo.linear()
    target = torch.ao.nn.qat.Linear(
        3, 3, qconfig=torch.ao.quantization.get_default_qconfig("fbgemm")
    )
    for name in ("weight", "bias"):
        api.register_parametrization(source, name, parametrization())
        api.register_parametrization(source, name, zoo.Double())
    api.transfer_parametrizations_and_params(source, target, "weight")
    assert api.type_before_parametrizations(target) is torch.ao.nn.qat.Linear
    assert api.is_parametrized(target, "weight") and not api.is_parametrized(target, "bias")
    assert_close(target.weight, source.weight)


def test_transfer_to_a_subclass(api: Any) -> None:
    class Quantized(nn.Linear):
        pass

    source, target = zoo.linear(), Quantized(3, 3)
    api.register_parametrization(source, "weight", zoo.Symmetric())
    api.transfer_parametrizations_and_params(source, target)
    assert api.type_before_parametrizations(target) is Quantized
    assert_close(target.weight, source.weight)


def test_transfer_from_a_plain_module_does_nothing(api: Any) -> None:
    source, target = zoo.linear(), zoo.linear()
    before = zoo.everything(target)
    assert api.transfer_parametrizations_and_params(source, target) is target
    assert zoo.everything(target) == before


def test_transfer_onto_a_parametrized_tensor_appends(api: Any) -> None:
    source, target = zoo.linear(), zoo.linear()
    api.register_parametrization(source, "weight", zoo.Double())
    api.register_parametrization(target, "weight", zoo.Symmetric())
    chain = target.parametrizations.weight
    api.transfer_parametrizations_and_params(source, target)
    assert target.parametrizations.weight is chain and len(chain) == 2
    assert chain.original is source.parametrizations.weight.original


def test_transfer_leaves_the_target_parameter_alone() -> None:
    """The parameter it replaces is not written; torch sets it to its right inverse on the way."""
    for api, kept in ((ours, True), (torch_parametrize, False)):
        source, target = zoo.linear(), zoo.linear()
        weight, value = target.weight, target.weight.detach().clone()
        api.register_parametrization(source, "weight", zoo.Double())
        api.transfer_parametrizations_and_params(source, target)
        assert torch.equal(weight.detach(), value) is kept
