"""Misuses of removal, assignment, transfer and names: torch's error types, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn

import fxparam.parametrize as ours
from tests import zoo


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
        api.register_parametrization(layer, "weight", zoo.maps(lambda x: x.double()), unsafe=True)
        before = zoo.everything(layer)
        with pytest.raises(RuntimeError) as caught:
            api.remove_parametrizations(layer, "weight")
        assert zoo.everything(layer) == before
        if api is ours:
            assert "float32" in str(caught.value) and "float64" in str(caught.value)


def test_removal_when_the_evaluation_raises() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()
        api.register_parametrization(layer, "weight", zoo.maps(zoo.fails), unsafe=True)
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
        (lambda: Fickle(zoo.same, lambda y: (y,)), ValueError, ["should return a tensor", "tuple"]),
        (lambda: Fickle(zoo.same, lambda y: y.double()), ValueError, ["float32", "float64"]),
        (
            lambda: Fickle(lambda y: (y, y), zoo.same),
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
        (lambda: Fickle(zoo.same, zoo.fails), ZeroDivisionError, ["midway"]),
        (lambda: Fickle(zoo.same, lambda y: y.to("meta")), RuntimeError, []),
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


class _Remembers(nn.Module):
    """Two originals, and the last value that was assigned, which may be one too few."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 2))
        self.assigned = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        self.last.copy_(value)
        self.assigned += 1
        return (value, torch.zeros_like(value))[: 2 if value.any() else 1]


def test_a_refused_assignment_leaves_no_trace_in_buffers() -> None:
    layer = nn.Linear(2, 2)
    ours.register_parametrization(layer, "weight", _Remembers())
    layer.weight = torch.eye(2)
    step = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    assigned = step.assigned
    with pytest.raises(ValueError, match="length"):
        layer.weight = torch.zeros(2, 2)
    assert torch.equal(step.last, torch.eye(2)) and step.assigned == assigned
    assert torch.equal(layer.weight, torch.eye(2))


def test_assignment_not_implemented() -> None:
    for api in (torch_parametrize, ours):
        layer = zoo.linear()

        def refuses(y: Tensor) -> Tensor:
            raise NotImplementedError("no inverse")

        api.register_parametrization(layer, "weight", zoo.maps(zoo.same, refuses))
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
        api.register_parametrization(source, "weight", zoo.maps(lambda x: x[:1]), unsafe=True)
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


class _WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.zero_()
        return x[:1]


class _InverseWritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1]

    def right_inverse(self, y: Tensor) -> Tensor:
        return y.zero_()


@pytest.mark.parametrize("kind", [_WritesItsInput, _InverseWritesItsInput])
def test_a_refused_parametrization_that_wrote_its_input(kind: type[nn.Module]) -> None:
    layer = nn.Linear(3, 3)
    weight, before = layer.weight, layer.weight.detach().clone()
    with pytest.raises(ValueError, match="shape"):
        ours.register_parametrization(layer, "weight", kind())
    assert layer.weight is weight
    assert torch.equal(weight, before)


@pytest.mark.parametrize("call", ["transfer", "remove"])
def test_a_refused_call_evaluates_without_a_trace(call: str) -> None:
    source, target = zoo.linear(), nn.Linear(2, 2)
    ours.register_parametrization(source, "weight", zoo.Steps())
    ours.register_parametrization(source, "weight", zoo.maps(lambda x: x[:1].double()), unsafe=True)
    before = zoo.everything(source, target)
    with pytest.raises((RuntimeError, ValueError)):
        if call == "remove":
            ours.remove_parametrizations(source, "weight")
        else:
            ours.transfer_parametrizations_and_params(source, target)
    assert zoo.everything(source, target) == before


def test_removal_of_several_leaves_a_parameter() -> None:
    """A frozen layer keeps its parameter, and so does one that is read without gradients."""
    for frozen, grad in ((True, True), (False, False)):
        layer = zoo.linear().requires_grad_(not frozen)
        ours.register_parametrization(layer, "weight", zoo.Sum())
        with torch.set_grad_enabled(grad):
            ours.remove_parametrizations(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad is not frozen


def _deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(200)))


def _wide() -> nn.Module:
    module = nn.Module()
    for i in range(200):
        module.register_parameter(f"parameter_{i}", nn.Parameter(torch.ones(1)))
    return module


def _wide_parametrized() -> nn.Module:
    module = _wide()
    for i in range(12):
        ours.register_parametrization(module, f"parameter_{i}", zoo.Identity())
    return module


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: ours.register_parametrization(_deep(), "weight", zoo.Identity()), "Sequential"),
        (lambda: ours.register_parametrization(_wide(), "weight", zoo.Identity()), "190 more"),
        (lambda: ours.register_parametrization(_deep(), _deep(), zoo.Identity()), "Sequential"),
        (lambda: ours.register_parametrization([_deep()], "weight", zoo.Identity()), "found: list"),
        (lambda: ours.register_parametrization(_deep(), "weight", [_deep()]), "found: list"),
        (lambda: ours.adopt({"model": _deep()}), "found: dict"),
        (lambda: ours.remove_parametrizations(_deep(), "weight"), "Sequential"),
        (lambda: ours.remove_parametrizations(_deep(), _deep()), "Sequential"),
        (lambda: ours.remove_parametrizations(_wide_parametrized(), "weight"), "2 more"),
        (
            lambda: ours.transfer_parametrizations_and_params(
                _wide_parametrized(), zoo.linear(), "weight"
            ),
            "2 more",
        ),
        (lambda: ours.transfer_parametrizations_and_params(_deep(), [_deep()]), "found: list"),
    ],
)
def test_an_error_names_a_model_and_does_not_print_it(call: Callable[[], Any], found: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        call()
    assert found in str(caught.value)
    assert len(str(caught.value)) < 600
