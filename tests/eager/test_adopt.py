"""``adopt``: modules parametrized through torch become ours, in place."""

from __future__ import annotations

import abc
import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo
from tests.zoo import build

WRAPS = [orthogonal, spectral_norm, weight_norm]


def snapshot(model: nn.Module) -> list[Any]:
    """``zoo.everything`` without the classes, which are what adopting changes."""
    return [x for x in zoo.everything(model) if not isinstance(x, type)]


def is_ours(model: nn.Module) -> bool:
    lists = [m for m in model.modules() if isinstance(m, torch_parametrize.ParametrizationList)]
    owners = [m for m in model.modules() if ours.is_parametrized(m)]
    return all(isinstance(m, ours.ParametrizationList) for m in lists) and not any(
        cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith("Parametrized")
        and cls is not torch_parametrize.ParametrizationList
        for m in owners for cls in type(m).__mro__
    )  # fmt: skip


@pytest.mark.parametrize("wrap", [*WRAPS, None])
def test_adopt_in_place(wrap: Any) -> None:
    model = build(torch_parametrize) if wrap is None else nn.Sequential(wrap(nn.Linear(3, 4)))
    model.eval()
    layer = model[0]
    layer.parametrizations.weight.note = ["kept"]
    calls: list[str] = []
    layer.parametrizations.weight.register_forward_hook(lambda *_: calls.append("hook"))
    before, value, chain = snapshot(model), layer.weight, layer.parametrizations.weight
    assert not is_ours(model)
    assert ours.adopt(model) is model and is_ours(model)
    assert snapshot(model) == before
    assert layer.parametrizations.weight is chain and chain.note == ["kept"]
    assert_close(layer.weight, value)
    assert calls == ["hook", "hook"]
    with ours.cached():
        assert layer.weight is layer.weight
    after = zoo.everything(model)
    assert zoo.everything(ours.adopt(model)) == after
    for name in list(layer.parametrizations):
        ours.remove_parametrizations(layer, name)
    assert type(layer) is nn.Linear


def test_adopt_visits_nested_parametrizations() -> None:
    layer = torch_parametrize.register_parametrization(zoo.linear(), "weight", zoo.Scaled())
    chain = layer.parametrizations.weight
    torch_parametrize.register_parametrization(chain, "original", zoo.Symmetric())
    torch_parametrize.register_parametrization(chain[0], "scale", zoo.Double())
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": layer})
    before, value = snapshot(model), layer.weight
    ours.adopt(model)
    assert is_ours(model) and snapshot(model) == before
    assert_close(layer.weight, value)
    assert type(chain).__bases__ == (ours.ParametrizationList,)
    assert type(chain.parametrizations.original) is ours.ParametrizationList
    with torch.no_grad(), ours.cached():
        shared = layer.weight
        chain[0].parametrizations.scale.original.add_(1)
        assert layer.weight is not shared


def test_adopt_leaves_other_modules_alone() -> None:
    theirs = torch_parametrize.register_parametrization(zoo.linear(), "weight", zoo.Double())
    twin = copy.deepcopy(theirs)  # torch's copies share their class
    assert type(twin) is type(theirs)
    ours.adopt(theirs)
    assert type(twin) is not type(theirs) and twin.weight.grad_fn is not None
    mine = build(ours)
    before = zoo.everything(mine)
    ours.adopt(mine)
    assert zoo.everything(mine) == before
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = zoo.everything(plain)
    ours.adopt(plain)
    assert zoo.everything(plain) == before


def test_adopt_shares_the_class() -> None:
    model = nn.Sequential(*(weight_norm(nn.Linear(2, 2)) for _ in range(3)))
    assert len({type(layer) for layer in model}) == 3
    ours.adopt(model)
    assert len({type(layer) for layer in model}) == 1


def test_adopt_below_another_class() -> None:
    layer = torch_parametrize.register_parametrization(zoo.linear(), "weight", zoo.Double())
    layer.__class__ = type("Sharded", (zoo.Identity, type(layer)), {"forward": nn.Linear.forward})
    value = layer.weight
    ours.adopt(layer)
    assert isinstance(layer, zoo.Identity)
    assert_close(layer.weight, value)
    with ours.cached():
        assert layer.weight is layer.weight


def test_adopt_a_compiled_module() -> None:
    layer = torch_parametrize.register_parametrization(zoo.linear(), "weight", zoo.Double())
    compiled = torch.compile(layer, backend="eager")
    ours.adopt(compiled)
    assert is_ours(layer)
    assert_close(compiled(torch.eye(3)), layer(torch.eye(3)))


class _Abstract(nn.Linear, abc.ABC):
    """A class whose metaclass is written in Python."""


class _Own(type):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls, *args, **kwargs)


class _OfItsOwn(nn.Linear, metaclass=_Own):
    pass


@pytest.mark.parametrize("cls", [_Abstract, _OfItsOwn])
def test_adopt_under_a_metaclass(cls: type[nn.Linear]) -> None:
    first, second = (
        torch_parametrize.register_parametrization(cls(3, 3), "weight", zoo.Symmetric())
        for _ in range(2)
    )
    for model in (first, second):
        ours.adopt(model)
    assert type(first) is type(second)
    assert ours.type_before_parametrizations(first) is cls
    with ours.cached():
        assert first.weight is first.weight
    twin = pickle.loads(pickle.dumps(first))
    assert torch.equal(twin.weight, first.weight)
    assert type(ours.remove_parametrizations(first, "weight")) is cls


def test_adopt_leaves_scripted_modules_alone() -> None:
    scripted = torch.jit.script(zoo.linear())
    model = nn.Sequential(scripted, weight_norm(nn.Linear(3, 3)))
    assert is_ours(ours.adopt(model)) and model[0] is scripted
