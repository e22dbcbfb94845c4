"""State dicts of the model without parametrizations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxparam
from fxparam.parametrizations import orthogonal, spectral_norm, weight_norm


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return 2 * x


def _model(parametrized: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(4)] + [nn.BatchNorm1d(4)]
    if parametrized:
        orthogonal(layers[0])
        weight_norm(layers[1])
        spectral_norm(layers[2])
        fxparam.register_parametrization(layers[3], "weight", Half())
        fxparam.register_parametrization(layers[3], "bias", Half())
        fxparam.register_parametrization(layers[4], "running_mean", Half())
        inner = layers[3].parametrizations.weight
        fxparam.register_parametrization(inner, "original", Half())
    return nn.Sequential(*layers[:3], nn.Sequential(*layers[3:]), layers[1])


def test_a_plain_model_loads_it_and_computes_the_same() -> None:
    model, plain = _model(True), _model(False)
    before = copy.deepcopy(model.state_dict())
    found = fxparam.plain_state_dict(model)
    plain.load_state_dict(found)
    assert not any(value.requires_grad for value in found.values())
    assert found["1.weight"] is found["4.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    x = torch.randn(3, 4)
    with torch.no_grad():
        model[2].parametrizations.weight[0].eval()
        plain[2].weight.copy_(model[2].weight)  # training moves spectral norm's vectors
        assert_close(plain(x), model(x))


def test_each_is_evaluated_once() -> None:
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return x + 1

    layer = fxparam.register_parametrization(nn.Linear(2, 2), "weight", Counted())
    shared = nn.Sequential(layer, layer)
    calls.clear()
    fxparam.plain_state_dict(shared)
    assert len(calls) == 1


def test_a_parametrized_model_loads_that_of_a_plain_one() -> None:
    model, plain = _model(True), _model(False)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        plain[0].weight.copy_(torch.linalg.qr(torch.randn(4, 4))[0])
        plain[2].weight.copy_(model.eval()[2].weight)
    fxparam.load_plain_state_dict(model, plain.state_dict())
    x = torch.randn(3, 4)
    assert_close(model(x), plain.eval()(x))
    found = fxparam.plain_state_dict(model)
    for name, value in plain.state_dict().items():
        assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_keys_that_differ() -> None:
    model, given = _model(True), _model(False).state_dict()
    before = copy.deepcopy(model.state_dict())
    given["other"] = given.pop("0.weight")
    with pytest.raises(RuntimeError, match=r"missing: \['0.weight'\]\nunexpected: \['other'\]"):
        fxparam.load_plain_state_dict(model, given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    fxparam.load_plain_state_dict(model, given, strict=False)


def test_a_value_of_another_shape_is_refused_before_anything_is_changed() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)))
    fxparam.register_parametrization(layers[0], "weight", Half())
    before = copy.deepcopy(layers.state_dict())
    for name in ("0.weight", "1.weight"):
        given = {key: value + 1 for key, value in fxparam.plain_state_dict(layers).items()}
        given[name] = torch.ones(4)
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            fxparam.load_plain_state_dict(layers, given)
        for key, value in layers.state_dict().items():
            assert torch.equal(value, before[key])


def test_values_are_cast_as_by_load_state_dict() -> None:
    half = fxparam.register_parametrization(nn.Linear(2, 2), "weight", Half())
    for layer in (half, weight_norm(nn.Linear(2, 2))):
        given = {key: value.double() + 1 for key, value in fxparam.plain_state_dict(layer).items()}
        fxparam.load_plain_state_dict(layer, given)
        assert layer.weight.dtype is torch.float32
        assert_close(layer.weight, given["weight"].float())


def test_what_is_no_module_is_refused() -> None:
    for function in (fxparam.plain_state_dict, lambda x: fxparam.load_plain_state_dict(x, {})):
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            function(torch.ones(1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_buffers_that_ops_write_without_a_new_version_are_left_as_they_were() -> None:
    layer = fxparam.register_parametrization(nn.Linear(3, 3), "weight", Normed())
    before = copy.deepcopy(layer.state_dict())
    fxparam.plain_state_dict(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_models_without_data_have_plain_state_dicts() -> None:
    with torch.device("meta"):
        normed = fxparam.register_parametrization(nn.Linear(3, 3), "weight", Normed())
        model = nn.Sequential(weight_norm(nn.Linear(3, 3)), normed)
    plain = fxparam.plain_state_dict(model)
    assert set(plain) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(value.is_meta for value in plain.values())
