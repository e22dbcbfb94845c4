"""``disabled()``: originals in place of values, in eager and compiled code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.testing import assert_close

import fxparam
from tests import zoo


def _model() -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(2)]
    for layer in layers:
        fxparam.register_parametrization(layer, "weight", zoo.Double())
    return nn.Sequential(*layers)


def _plain(model: Any) -> nn.Module:
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    names = {k.replace("parametrizations.weight.original", "weight"): v for k, v in _state(model)}
    plain.load_state_dict(names)
    return plain


def _state(model: nn.Module) -> Any:
    return model.state_dict().items()


def test_originals_are_read_and_get_the_gradients() -> None:
    model, x = _model(), torch.randn(2, 3)
    plain = _plain(model)
    with fxparam.disabled(model):
        model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(model[0].bias.grad, plain[0].bias.grad)
    assert_close(model[0].parametrizations.weight.original.grad, plain[0].weight.grad)
    assert_close(model[0].weight, 2 * plain[0].weight)


@pytest.mark.parametrize("ours", [True, False])
def test_no_graph_is_compiled_anew(ours: bool) -> None:
    model, x, graphs = _model(), torch.randn(2, 3), []

    def record(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled = torch.compile(model, backend=fxparam.backend(record) if ours else record)
    plain = _plain(model)
    for again in range(4):
        assert_close(compiled(x), model(x))
        with fxparam.disabled(model, "weight"):
            assert_close(compiled(x), plain(x))
            with fxparam.disabled(model, "0.weight"):
                assert_close(compiled(x), plain(x))
            assert_close(compiled(x), plain(x))
        if again == 0:
            known = len(graphs)
    assert len(graphs) == known


def test_scopes_have_values_for_both_states() -> None:
    model, x = _model(), torch.randn(2, 3)
    plain = _plain(model)
    with torch.no_grad(), fxparam.cached(), fxparam.frozen(model):
        value = model[0].weight
        with fxparam.disabled(model):
            assert_close(model(x), plain(x))
            twin = copy.deepcopy(model)
        assert model[0].weight is value
    assert_close(twin[0].weight, value)


def test_blocks_that_end_in_the_order_they_began() -> None:
    layer = _model()[0]
    first, second = fxparam.disabled(layer), fxparam.disabled(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert layer.weight is layer.parametrizations.weight.original
    second.__exit__(None, None, None)
    assert layer.weight is not layer.parametrizations.weight.original


def test_what_reads_a_disabled_tensor_is_evaluated_anew() -> None:
    inner, outer = _model()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.others = [inner]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.others[0].weight

    fxparam.register_parametrization(outer, "weight", Reads())
    with fxparam.cached():
        value = outer.weight
        with fxparam.disabled(inner):
            assert_close(outer.weight, value - inner.weight)
        assert_close(outer.weight, value)


def test_names_in_a_compiled_model_and_a_refusal_that_changes_nothing() -> None:
    model = _model()
    with fxparam.disabled(torch.compile(model, backend="eager"), "0.weight"):
        assert model[0].weight is model[0].parametrizations.weight.original
    layer = orthogonal(nn.Linear(3, 3))
    before = type(layer)
    with pytest.raises(ValueError), fxparam.disabled(layer, "nope"):
        pass
    assert type(layer) is before


def test_one_tensor_of_one_module() -> None:
    model = _model()
    fxparam.register_parametrization(model[1], "bias", zoo.Double())
    with fxparam.disabled(model, "1.weight", "bias"):
        assert model[0].weight is not model[0].parametrizations.weight.original
        assert model[1].weight is model[1].parametrizations.weight.original
        assert model[1].bias is model[1].parametrizations.bias.original


def test_an_assignment_is_one_of_the_original() -> None:
    layer = _model()[0]
    with fxparam.disabled(layer, "weight"):
        layer.weight = torch.ones(3, 3)
    assert_close(layer.weight, torch.full((3, 3), 2.0))


def test_what_is_registered_with_torch() -> None:
    layer = orthogonal(nn.Linear(3, 3))
    with fxparam.disabled(layer):
        assert layer.weight is layer.parametrizations.weight.original


@pytest.mark.parametrize(
    ("make", "names", "error", "text"),
    [
        (lambda: weight_norm(nn.Linear(3, 3)), ("weight",), RuntimeError, "found: 2"),
        (_model, ("wieght",), ValueError, r"found: \['0.weight', '1.weight'\]"),
        (lambda: torch.ones(3), (), TypeError, "must be a torch.nn.Module"),
    ],
)
def test_refused(make: Any, names: tuple[str, ...], error: type[Exception], text: str) -> None:
    model: Any = make()
    before: dict[str, Tensor] = {} if isinstance(model, Tensor) else dict(model.state_dict())
    with pytest.raises(error, match=text), fxparam.disabled(model, *names):
        pass
    assert isinstance(model, Tensor) or before.keys() == model.state_dict().keys()
