"""Each misuse raises what torch raises, says what was required and found, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import nn

import fxparam.parametrize as ours
from tests import zoo


class Case(NamedTuple):
    """One misuse: what is called on which module, the error, and words its message has."""

    name: str
    parametrization: Callable[[], Any]
    error: type[Exception]
    words: list[str]
    unsafe: bool = False


FIRST = [
    Case(
        "not a tensor", lambda: zoo.maps(lambda x: 2), ValueError, ["must return a tensor", "int"]
    ),
    Case(
        "dtype of the value",
        lambda: zoo.maps(lambda x: x.double()),
        ValueError,
        ["may not change the dtype", "float32", "float64"],
    ),
    Case(
        "shape of the value",
        lambda: zoo.maps(lambda x: x[:2]),
        ValueError,
        ["may not change the shape", "(3, 3)", "(2, 3)"],
    ),
    Case(
        "dtype of the value of several",
        lambda: zoo.maps(lambda x, y: (x + y).bool(), lambda y: (y, y)),
        ValueError,
        ["may not change the dtype", "float32", "bool"],
    ),
    Case(
        "inverse is no tensor",
        lambda: zoo.maps(zoo.same, lambda y: None),
        ValueError,
        ["Tensor or a Sequence of", "NoneType"],
    ),
    Case(
        "inverse is no tensor, unsafe",
        lambda: zoo.maps(zoo.same, lambda y: 3.5),
        ValueError,
        ["Tensor or a Sequence of", "float"],
        unsafe=True,
    ),
    Case(
        "inverse has an element that is no tensor",
        lambda: zoo.maps(lambda x, y: x, lambda y: (y, "no")),
        ValueError,
        ["element 1", "of the sequence with type str"],
    ),
    Case(
        "inverse changes the dtype",
        lambda: zoo.maps(lambda x: x.float(), lambda y: y.bool()),
        ValueError,
        ["outputs one tensor, it may not change the dtype", "float32", "bool"],
    ),
    Case(
        "inverse changes the dtype, unsafe",
        lambda: zoo.maps(lambda x: x.float(), lambda y: y.double()),
        ValueError,
        ["may not change the dtype", "float32", "float64"],
        unsafe=True,
    ),
    Case(
        "inverse changes the device",
        lambda: zoo.maps(zoo.same, lambda y: y.to("meta")),
        ValueError,
        ["may not change the device", "cpu", "meta"],
    ),
    Case(
        "wrong number of originals",
        lambda: zoo.maps(lambda x, y, z: x, lambda y: (y, y)),
        TypeError,
        ["positional argument"],
    ),
    Case(
        "forward raises",
        lambda: zoo.maps(zoo.fails, lambda y: y / 2),
        ZeroDivisionError,
        ["midway"],
    ),
    Case(
        "forward raises, several originals",
        lambda: zoo.maps(zoo.fails, lambda y: (y / 2, y / 2)),
        ZeroDivisionError,
        ["midway"],
    ),
    Case("inverse raises", lambda: zoo.maps(zoo.same, zoo.fails), ZeroDivisionError, ["midway"]),
    Case("a function", lambda: torch.tanh, AttributeError, ["torch.nn.Module", "tanh"]),
    Case("a class", lambda: zoo.Identity, AttributeError, ["torch.nn.Module", "make an instance"]),
]

FURTHER = [
    Case("not a tensor", lambda: zoo.maps(lambda x: (x, x)), ValueError, ["must return a tensor"]),
    Case(
        "dtype of the value",
        lambda: zoo.maps(lambda x: x.bool()),
        ValueError,
        ["may not change the dtype", "float32", "bool"],
    ),
    Case(
        "shape of the value",
        lambda: zoo.maps(lambda x: x[:2]),
        ValueError,
        ["may not change the shape", "[3, 3]", "[2, 3]"],
    ),
    Case(
        "inverse is no tensor",
        lambda: zoo.maps(zoo.same, lambda y: (y, y)),
        ValueError,
        ["right_inverse must return a tensor", "tuple"],
    ),
    Case(
        "inverse changes the dtype",
        lambda: zoo.maps(zoo.same, lambda y: y.bool()),
        ValueError,
        ["must have the same dtype", "float32", "bool"],
    ),
    Case(
        "inverse changes the shape",
        lambda: zoo.maps(zoo.same, lambda y: y[:2]),
        ValueError,
        ["must have the same shape", "[3, 3]", "[2, 3]"],
    ),
    Case("forward raises", lambda: zoo.maps(zoo.fails), ZeroDivisionError, ["midway"]),
    Case("inverse raises", lambda: zoo.maps(zoo.same, zoo.fails), ZeroDivisionError, ["midway"]),
    Case("a function", lambda: torch.tanh, AttributeError, ["torch.nn.Module"]),
]


def refuse(case: Case, setup: Callable[[Any, nn.Module], None]) -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear().eval()
        setup(api, layer)
        parametrization = case.parametrization()
        others = [parametrization] if isinstance(parametrization, nn.Module) else []
        before = zoo.everything(layer, *others)
        with pytest.raises(case.error) as caught:
            api.register_parametrization(layer, "weight", parametrization, unsafe=case.unsafe)
        if api is ours:
            assert zoo.everything(layer, *others) == before
            assert all(word in str(caught.value) for word in case.words), str(caught.value)


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
def test_refused_registration(case: Case) -> None:
    refuse(case, lambda api, layer: None)


@pytest.mark.parametrize("case", FURTHER, ids=lambda case: case.name)
def test_refused_registration_in_a_chain(case: Case) -> None:
    refuse(case, lambda api, layer: api.register_parametrization(layer, "weight", zoo.Double()))


def test_torch_changes_the_tensor_before_it_refuses() -> None:
    """Why the checks come first: torch has already stored the right inverse."""
    for api, kept in ((ours, True), (torch_parametrize, False)):
        layer = zoo.linear()
        value = layer.weight.detach().clone()
        with pytest.raises(ZeroDivisionError):
            api.register_parametrization(layer, "weight", zoo.maps(zoo.fails, lambda y: y / 2))
        assert torch.equal(layer.weight.detach(), value) is kept


class _Untidy(nn.Module):
    """Leaves a trace in all that it reaches, and changes the shape."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.scale = nn.Parameter(torch.ones(()))
        self.results: list[torch.Tensor] = []
        self.exchanged = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x[:1] * self.scale
        self.results.append(self.last)
        self.count = self.count.add_(1) * 2
        self.exchanged.data = torch.zeros(3)
        with torch.no_grad():
            self.scale.add_(1)
            x.zero_()
        return self.last


@pytest.mark.parametrize("before", [(), (zoo.Identity,), (zoo.Steps, zoo.Identity)])
def test_a_refused_parametrization_leaves_no_trace(before: tuple[type[nn.Module], ...]) -> None:
    layer, untidy = zoo.linear(), _Untidy()
    for kind in before:
        ours.register_parametrization(layer, "weight", kind())
    state = [zoo.everything(layer, untidy), untidy.exchanged.tolist(), untidy.results[:]]
    with pytest.raises(ValueError, match="shape"):
        ours.register_parametrization(layer, "weight", untidy)
    assert state == [zoo.everything(layer, untidy), untidy.exchanged.tolist(), untidy.results]


@pytest.mark.parametrize("kind", ["lazy", "scripted"])
def test_modules_whose_tensors_cannot_be_parametrized(kind: str) -> None:
    for api in (ours, torch_parametrize):
        module = nn.LazyLinear(3) if kind == "lazy" else torch.jit.script(zoo.linear())
        before = str(module.state_dict())
        with pytest.raises(RuntimeError) as caught:
            api.register_parametrization(module, "weight", zoo.Double())
        with pytest.raises(ValueError, match="does not have a parametrization"):
            api.remove_parametrizations(module, "weight")
        if api is ours:
            assert "required:" in str(caught.value)
            assert str(module.state_dict()) == before
