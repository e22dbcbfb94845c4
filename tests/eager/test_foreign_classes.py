"""Tensors and modules of classes that others wrote."""

from __future__ import annotations

from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import fxparam.parametrize as ours
from tests import zoo


@pytest.fixture(params=["ours", "torch"])
def api(request: pytest.FixtureRequest) -> ModuleType:
    """Every row is walked with torch's functions too: that it is their contract is checked."""
    return ours if request.param == "ours" else torch_parametrize


class Wrap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return TwoTensor(x, x)


class Unwrap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.a


class WrapInverse(zoo.Identity):
    def right_inverse(self, y: Tensor) -> Tensor:
        return TwoTensor(y, y)


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize(
    ("parametrization", "start", "stored", "value"),
    [
        (Wrap, Tensor, Tensor, TwoTensor),
        (Unwrap, TwoTensor, TwoTensor, Tensor),
        (WrapInverse, Tensor, TwoTensor, TwoTensor),
    ],
)
def test_wrapper_subclasses(
    api: Any,
    parametrization: Any,
    start: type,
    stored: type,
    value: type,
    leave_parametrized: bool,
) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = nn.Module()
        plain = [torch.randn(2, 2) for _ in range(2)]
        data = [TwoTensor(x, x) if start is TwoTensor else x for x in plain]
        module.weight = nn.Parameter(data[0])
        module.register_buffer("table", data[1])
        tensors = SimpleNamespace(weight=module.weight, table=module.table)
        for name in ("weight", "table"):
            tensor = getattr(tensors, name)
            api.register_parametrization(module, name, parametrization())
            original = module.parametrizations[name].original
            assert original is tensor and isinstance(original, stored)
            assert isinstance(original, TwoTensor) == (stored is TwoTensor)
            assert isinstance(original, nn.Parameter) == (name == "weight")
            api.remove_parametrizations(module, name, leave_parametrized)
            left = value if leave_parametrized else stored
            assert getattr(module, name) is tensor
            assert isinstance(tensor, TwoTensor) == (left is TwoTensor)
            assert isinstance(tensor, nn.Parameter) == (name == "weight")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# --- user classes -----------------------------------------------------------------------------


class Meta(type):
    pass


class WithMeta(nn.Linear, metaclass=Meta):
    pass


class Slotted(nn.Linear):
    __slots__ = ("note",)


class Watchful(nn.Linear):
    """Records and forwards attribute access, as wrappers do."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


@pytest.mark.parametrize("cls", [WithMeta, Slotted, Watchful])
def test_user_classes(api: Any, cls: type[nn.Linear]) -> None:
    layer = cls(3, 3)
    api.register_parametrization(layer, "weight", zoo.Symmetric())
    assert isinstance(layer, cls) and isinstance(type(layer), type(cls))
    layer.weight = torch.eye(3)
    assert_close(layer(torch.eye(3)), torch.eye(3) + layer.bias)
    api.remove_parametrizations(layer, "weight")
    assert type(layer) is cls


def test_a_class_attribute_of_the_same_name() -> None:
    """It shows again where the instance has no parametrization; torch fails with an assertion."""

    class Computed(nn.Module):
        scale = 5

        def __init__(self) -> None:
            super().__init__()
            self._parameters["weight"] = nn.Parameter(torch.ones(2))

        @property
        def weight(self) -> Tensor:
            return 7 * self._parameters["weight"]

    module, sibling = Computed(), Computed()
    for m in (module, sibling):
        ours.register_parametrization(m, "weight", zoo.Double())
    assert_close(module.weight, torch.ones(2))
    ours.remove_parametrizations(sibling, "weight")
    assert type(sibling) is Computed and torch.equal(sibling.weight, 7 * torch.ones(2))
    assert_close(module.weight, torch.ones(2))


def test_jit_trace(api: Any) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Symmetric())
    traced = torch.jit.trace(layer, torch.ones(1, 3))
    assert_close(traced(torch.ones(1, 3)), layer(torch.ones(1, 3)))


@cache
def opaque_class() -> Any:
    """A class of opaque references; skips where PyTorch (2.12 and older) has no such originals."""
    if not hasattr(torch_parametrize, "OpaqueBase"):
        pytest.skip("right inverses return tensors only in this version")
    from torch._library.opaque_object import register_opaque_type

    class Handle(torch_parametrize.OpaqueBase):
        pass

    register_opaque_type(Handle, typ="reference")
    return Handle


def test_an_opaque_original(api: Any) -> None:
    handle = opaque_class()

    class Split(nn.Module):
        def forward(self, x: Tensor, opaque: Any) -> Tensor:
            assert isinstance(opaque, handle)
            return x

        def right_inverse(self, y: Tensor) -> tuple[Tensor, Any]:
            return y, handle()

    layer = zoo.linear()
    api.register_parametrization(layer, "weight", Split())
    chain = layer.parametrizations.weight
    first = chain.original1
    assert isinstance(first, handle) and list(chain.state_dict()) == ["original0"]
    with api.cached():
        shared = layer.weight
        assert layer.weight is shared
    layer.weight = torch.eye(3)
    assert chain.original1 is not first and torch.equal(layer.weight, torch.eye(3))
    api.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
