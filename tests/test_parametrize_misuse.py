"""Each misuse raises what torch raises, says what was required and found, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn

import fxparam.parametrize as ours
from tests import zoo


def maps(forward: Callable[..., Any], inverse: Callable[[Tensor], Any] | None = None) -> nn.Module:
    """A parametrization made of two functions."""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Dropout()

        def forward(self, *x: Tensor) -> Any:
            return forward(*x)

    if inverse is not None:
        Maps.right_inverse = lambda self, y: inverse(y)  # type: ignore[attr-defined]
    return Maps()


def fails(*_: Tensor) -> Any:
    raise ZeroDivisionError("midway")


def same(x: Tensor) -> Tensor:
    return x


class Case(NamedTuple):
    """One misuse: what is called on which module, the error, and words its message has."""

    name: str
    parametrization: Callable[[], Any]
    error: type[Exception]
    words: list[str]
    unsafe: bool = False


FIRST = [
    Case("not a tensor", lambda: maps(lambda x: 2), ValueError, ["must return a tensor", "int"]),
    Case(
        "dtype of the value",
        lambda: maps(lambda x: x.double()),
        ValueError,
        ["may not change the dtype", "float32", "float64"],
    ),
    Case(
        "shape of the value",
        lambda: maps(lambda x: x[:2]),
        ValueError,
        ["may not change the shape", "(3, 3)", "(2, 3)"],
    ),
    Case(
        "dtype of the value of several",
        lambda: maps(lambda x, y: (x + y).bool(), lambda y: (y, y)),
        ValueError,
        ["may not change the dtype", "float32", "bool"],
    ),
    Case(
        "inverse is no tensor",
        lambda: maps(same, lambda y: None),
        ValueError,
        ["Tensor or a Sequence of", "NoneType"],
    ),
    Case(
        "inverse is no tensor, unsafe",
        lambda: maps(same, lambda y: 3.5),
        ValueError,
        ["Tensor or a Sequence of", "float"],
        unsafe=True,
    ),
    Case(
        "inverse has an element that is no tensor",
        lambda: maps(lambda x, y: x, lambda y: (y, "no")),
        ValueError,
        ["element 1", "of the sequence with type str"],
    ),
    Case(
        "inverse changes the dtype",
        lambda: maps(lambda x: x.float(), lambda y: y.bool()),
        ValueError,
        ["outputs one tensor, it may not change the dtype", "float32", "bool"],
    ),
    Case(
        "inverse changes the dtype, unsafe",
        lambda: maps(lambda x: x.float(), lambda y: y.double()),
        ValueError,
        ["may not change the dtype", "float32", "float64"],
        unsafe=True,
    ),
    Case(
        "inverse changes the device",
        lambda: maps(same, lambda y: y.to("meta")),
        ValueError,
        ["may not change the device", "cpu", "meta"],
    ),
    Case(
        "wrong number of originals",
        lambda: maps(lambda x, y, z: x, lambda y: (y, y)),
        TypeError,
        ["positional argument"],
    ),
    Case("forward raises", lambda: maps(fails, lambda y: y / 2), ZeroDivisionError, ["midway"]),
    Case(
        "forward raises, several originals",
        lambda: maps(fails, lambda y: (y / 2, y / 2)),
        ZeroDivisionError,
        ["midway"],
    ),
    Case("inverse raises", lambda: maps(same, fails), ZeroDivisionError, ["midway"]),
    Case("a function", lambda: torch.tanh, AttributeError, ["torch.nn.Module", "tanh"]),
    Case("a class", lambda: zoo.Identity, AttributeError, ["torch.nn.Module", "make an instance"]),
]

FURTHER = [
    Case("not a tensor", lambda: maps(lambda x: (x, x)), ValueError, ["must return a tensor"]),
    Case(
        "dtype of the value",
        lambda: maps(lambda x: x.bool()),
        ValueError,
        ["may not change the dtype", "float32", "bool"],
    ),
    Case(
        "shape of the value",
        lambda: maps(lambda x: x[:2]),
        ValueError,
        ["may not change the shape", "[3, 3]", "[2, 3]"],
    ),
    Case(
        "inverse is no tensor",
        lambda: maps(same, lambda y: (y, y)),
        ValueError,
        ["right_inverse must return a tensor", "tuple"],
    ),
    Case(
        "inverse changes the dtype",
        lambda: maps(same, lambda y: y.bool()),
        ValueError,
        ["must have the same dtype", "float32", "bool"],
    ),
    Case(
        "inverse changes the shape",
        lambda: maps(same, lambda y: y[:2]),
        ValueError,
        ["must have the same shape", "[3, 3]", "[2, 3]"],
    ),
    Case("forward raises", lambda: maps(fails), ZeroDivisionError, ["midway"]),
    Case("inverse raises", lambda: maps(same, fails), ZeroDivisionError, ["midway"]),
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
            api.register_parametrization(layer, "weight", maps(fails, lambda y: y / 2))
        assert torch.equal(layer.weight.detach(), value) is kept


def check(error: type[Exception], words: list[str], call: Callable[[Any, nn.Module], Any]) -> None:
    """``call`` raises with torch's functions and ours; ours changes nothing and says ``words``."""
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        layer.register_parameter("missing", None)
        layer.register_buffer("keys_", torch.ones(1))
        api.register_parametrization(layer, "weight", zoo.Sum())
        api.register_parametrization(layer, "bias", zoo.Identity())
        before = zoo.everything(layer)
        with pytest.raises(error) as caught:
            call(api, layer)
        if api is ours:
            assert zoo.everything(layer) == before
            assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_such_tensor() -> None:
    for name in ("nothing", "in_features"):
        check(
            ValueError,
            ["does not have a parameter", f"'{name}'", "keys_"],
            lambda api, layer, name=name: api.register_parametrization(layer, name, zoo.Identity()),
        )


def test_a_parameter_that_is_none() -> None:
    check(
        AttributeError,
        ["required: a parameter or buffer", "Linear.missing", "None"],
        lambda api, layer: api.register_parametrization(layer, "missing", zoo.Identity()),
    )


def test_not_a_module() -> None:
    check(
        AttributeError,
        ["`module`", "torch.nn.Module", "dict"],
        lambda api, layer: api.register_parametrization({}, "weight", zoo.Identity()),
    )
    with pytest.raises(TypeError, match="`model`"):
        ours.adopt([zoo.linear()])  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["keys", "pop", "update"])
def test_a_name_that_module_dict_reserves(name: str) -> None:
    """torch raises too, but has taken the tensor out of the module by then."""
    for api, kept in ((ours, True), (torch_parametrize, False)):
        module = nn.Module()
        module._parameters[name] = nn.Parameter(torch.ones(2))
        before = zoo.everything(module)
        with pytest.raises(KeyError):
            api.register_parametrization(module, name, zoo.Identity())
        assert (zoo.everything(module) == before) is kept


def test_an_attribute_in_the_way() -> None:
    """torch silently replaces what a module keeps as ``parametrizations``."""
    layer = zoo.linear()
    layer.parametrizations = nn.ModuleList([nn.Linear(1, 1)])
    before = zoo.everything(layer)
    with pytest.raises(ValueError, match="required: no attribute.*\nfound: ModuleList"):
        ours.register_parametrization(layer, "weight", zoo.Identity())
    assert zoo.everything(layer) == before


def test_an_empty_list() -> None:
    for api in (torch_parametrize, ours):
        with pytest.raises(ValueError, match="one or more modules"):
            api.ParametrizationList([], torch.ones(2))


def test_removal_of_what_is_not_parametrized() -> None:
    for name in ("missing", "nothing", "keys_"):
        check(
            ValueError,
            ["does not have a parametrization", f"'{name}'", "['bias', 'weight']"],
            lambda api, layer, name=name: api.remove_parametrizations(layer, name),
        )


def test_removal_to_one_of_several_originals() -> None:
    check(
        ValueError,
        ["leave_parametrized=False", "required: one original", "found: 2 originals"],
        lambda api, layer: api.remove_parametrizations(layer, "weight", leave_parametrized=False),
    )


def test_removal_when_the_value_cannot_be_stored() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", maps(lambda x: x.double()), unsafe=True)
        before = zoo.everything(layer)
        with pytest.raises(RuntimeError) as caught:
            api.remove_parametrizations(layer, "weight")
        assert zoo.everything(layer) == before
        if api is ours:
            assert "float32" in str(caught.value) and "float64" in str(caught.value)


def test_removal_when_the_evaluation_raises() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", maps(fails), unsafe=True)
        before = zoo.everything(layer)
        with pytest.raises(ZeroDivisionError):
            api.remove_parametrizations(layer, "weight")
        assert zoo.everything(layer) == before


class Fickle(nn.Module):
    """Its right inverse gives ``first`` at registration and ``later`` from then on."""

    def __init__(self, first: Callable[[Tensor], Any], later: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inverses = [first, later]

    def forward(self, *x: Tensor) -> Tensor:
        return x[0]

    def right_inverse(self, y: Tensor) -> Any:
        return self.inverses[0](y) if len(self.inverses) == 1 else self.inverses.pop(0)(y)


@pytest.mark.parametrize(
    ("parametrization", "error", "words"),
    [
        (zoo.Skew, RuntimeError, ["does not implement right_inverse", "Skew"]),
        (lambda: Fickle(same, lambda y: (y,)), ValueError, ["should return a tensor", "tuple"]),
        (lambda: Fickle(same, lambda y: y.double()), ValueError, ["float32", "float64"]),
        (
            lambda: Fickle(lambda y: (y, y), same),
            ValueError,
            ["return a sequence of tensors", "required: 2 tensors", "found: Tensor"],
        ),
        (
            lambda: Fickle(lambda y: (y, y), lambda y: [y]),
            ValueError,
            ["required: length 2", "found: length 1"],
        ),
        (
            lambda: Fickle(lambda y: (y, y), lambda y: (y, y.double())),
            ValueError,
            ["Tensor 1", "float32", "float64"],
        ),
        (
            lambda: Fickle(lambda y: (y, y), lambda y: (y, None)),
            ValueError,
            ["element 1", "NoneType"],
        ),
        (lambda: Fickle(same, fails), ZeroDivisionError, ["midway"]),
        (lambda: Fickle(same, lambda y: y.to("meta")), RuntimeError, []),
        (lambda: Fickle(lambda y: (y, y), lambda y: (y, y.to("meta"))), RuntimeError, []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused_assignment(parametrization: Any, error: type[Exception], words: list[str]) -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", parametrization())
        before = zoo.everything(layer)
        with pytest.raises(error) as caught:
            layer.weight = torch.eye(3)
        if api is ours:
            assert zoo.everything(layer) == before
            assert all(word in str(caught.value) for word in words), str(caught.value)


def test_assignment_not_implemented() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()

        def refuses(y: Tensor) -> Tensor:
            raise NotImplementedError("no inverse")

        api.register_parametrization(layer, "weight", maps(same, refuses))
        with pytest.raises(NotImplementedError, match="no inverse"):
            layer.weight = torch.eye(3)


@pytest.mark.parametrize("value", [nn.Parameter(torch.eye(3)), None])
def test_a_parameter_cannot_be_assigned(value: Any) -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", zoo.Identity())
        before = zoo.everything(layer)
        with pytest.raises((KeyError, RuntimeError)):
            layer.weight = value
        with pytest.raises(AttributeError):
            del layer.weight
        assert zoo.everything(layer) == before


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (None, ValueError, ["may not change the shape", "[2, 2]", "[1, 2]"]),
        ("weight", ValueError, ["may not change the shape", "[2, 2]", "[1, 2]"]),
        ("bias", KeyError, ["'bias'", "['extra', 'weight']"]),
        ("nothing", AttributeError, ["'nothing'", "neither module"]),
    ],
)
def test_refused_transfer(name: str | None, error: type[Exception], words: list[str]) -> None:
    for api in (torch_parametrize, ours):
        source, target = zoo.linear(), nn.Linear(2, 2).eval()
        source.extra = nn.Parameter(torch.ones(2))
        api.register_parametrization(source, "extra", zoo.Double())
        api.register_parametrization(source, "weight", zoo.Double())
        api.register_parametrization(source, "weight", maps(lambda x: x[:1]), unsafe=True)
        before = zoo.everything(source, target)
        with pytest.raises(error) as caught:
            api.transfer_parametrizations_and_params(source, target, name)
        if api is ours:
            assert zoo.everything(source, target) == before
            assert all(word in str(caught.value) for word in words), str(caught.value)


def test_scripting_is_refused() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", zoo.Identity())
        scripted = torch.jit.script(layer)
        with pytest.raises(torch.jit.Error, match="not working with scripting"):
            scripted(torch.ones(1, 3))


def test_tracing_inside_a_region_is_refused() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", zoo.Identity())
        with api.cached(), pytest.raises(RuntimeError, match="Cannot trace a model while caching"):
            torch.jit.trace(layer, torch.ones(1, 3))
