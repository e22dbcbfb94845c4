"""Parametrized tensors are initialized through their right inverses, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxparam
from tests import helpers


class _Half(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w / 2

    def right_inverse(self, v: torch.Tensor) -> torch.Tensor:
        return v * 2


def _halved() -> nn.Linear:
    return fxparam.register_parametrization(nn.Linear(6, 5), "weight", _Half())


@pytest.mark.parametrize(
    "wrap", [_halved, lambda: fxparam.adopt(parametrizations.weight_norm(nn.Linear(6, 5)))]
)
def test_init(wrap: Any) -> None:
    layer = wrap()
    assert fxparam.init_(layer, "weight", nn.init.constant_, 0.25) is layer
    torch.testing.assert_close(layer.weight, torch.full((5, 6), 0.25))
    fxparam.init_(layer, "bias", nn.init.zeros_)
    assert not layer.bias.any()


def test_init_in_a_region_is_seen_at_once() -> None:
    layer = _halved()
    with fxparam.cached():
        before = layer.weight
        fxparam.init_(layer, "weight", nn.init.ones_)
        assert (layer.weight == 1).all() and not (before == 1).any()


@pytest.mark.parametrize("cls", [nn.Linear, nn.Conv1d])
def test_reset_parameters_gives_what_a_plain_module_gets(cls: Any) -> None:
    sizes = (3, 4, 2) if cls is nn.Conv1d else (3, 4)
    plain, layer = cls(*sizes), cls(*sizes)
    name = "weight"
    fxparam.register_parametrization(layer, name, _Half())
    original = layer.parametrizations[name].original
    for each in (plain, layer):
        torch.manual_seed(3)
        each.reset_parameters()
    for key, value in plain.named_parameters():
        torch.testing.assert_close(getattr(layer, key), value)
    assert layer.parametrizations[name].original is original
    assert name not in dict(layer.named_parameters())
    torch.testing.assert_close(original, 2 * getattr(plain, name))


def test_reset_parameters_of_a_module_that_goes_through_its_parameters() -> None:
    layer = fxparam.register_parametrization(nn.LSTM(3, 4), "weight_hh_l0", _Half())
    before = layer.weight_hh_l0.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight_hh_l0, before)
    assert layer.weight_hh_l0.abs().max() <= 0.5  # 1 / sqrt(hidden size), as of a plain LSTM
    assert layer(torch.ones(2, 1, 3))[0].shape == (2, 1, 4)


def test_without_a_right_inverse_it_is_refused_and_nothing_changes() -> None:
    layer = fxparam.register_parametrization(nn.Linear(3, 3), "weight", helpers.Counting())
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"reset_parameters.*\n.*'weight'"):
        layer.reset_parameters()
    with pytest.raises(RuntimeError, match="right_inverse"):
        fxparam.init_(layer, "weight", nn.init.zeros_)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_reset_that_raises_changes_nothing() -> None:
    class Broken(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            if hasattr(self, "ready"):
                raise KeyError("no")

    layer = fxparam.register_parametrization(Broken(3, 3), "weight", _Half())
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.ready = True
    with pytest.raises(KeyError):
        layer.reset_parameters()
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_a_reset_may_bind_other_tensors_and_keeps_the_order_of_submodules() -> None:
    class Rebinds(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.full((3, 3), 2.0))
            self.bias = nn.Parameter(torch.full((3,), 5.0))

    layer = fxparam.register_parametrization(Rebinds(3, 3), "weight", _Half())
    layer.after = nn.Linear(1, 1)
    names = [name for name, _ in layer.named_parameters()]
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight, torch.full((3, 3), 2.0))
    torch.testing.assert_close(layer.bias, torch.full((3,), 5.0))
    assert [name for name, _ in layer.named_parameters()] == names
