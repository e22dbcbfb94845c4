"""A region keeps apart the values of different modes, transforms, tracers and kinds of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import fxparam.parametrize as ours
from tests import zoo

MODES: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast half": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_each_mode_has_its_value(first: str, second: str) -> None:
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Counted(lambda w: w @ w), unsafe=True)
    with ours.cached():
        with MODES[first]():
            a = layer.weight
            assert layer.weight is a
        with MODES[second]():
            b, expected = layer.weight, zoo.fresh(layer)
        with MODES[first]():
            assert layer.weight is a
    assert (a is b) is (first == second)
    assert b.dtype == expected.dtype and b.requires_grad == expected.requires_grad
    assert b.is_inference() == expected.is_inference()


def test_the_default_dtype_and_device_are_modes() -> None:
    class Eye(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(x.shape[0])

    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", Eye(), unsafe=True)
    with ours.cached():
        assert layer.weight.dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert layer.weight.dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert layer.weight.is_meta
        assert not layer.weight.is_meta


def test_inference_tensors_are_not_shared() -> None:
    """They have no version counter, so nothing tells whether they were written."""
    with torch.inference_mode():
        layer, parametrization = zoo.counted(ours)
        with ours.cached():
            _ = layer.weight
            layer.parametrizations.weight.original.zero_()
            assert torch.equal(layer.weight, torch.zeros(3, 3))
    assert parametrization.evaluations == 2


def test_functorch_levels() -> None:
    layer, parametrization = zoo.counted(ours)
    x = torch.randn(4, 3)

    def loss(p: Any, x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, p, x).sum() * layer.weight.sum()).sum()

    params = dict(layer.named_parameters())
    gradient = torch.func.grad(loss)
    expected = torch.func.vmap(gradient, (None, 0))(params, x)
    with ours.cached():
        outer = layer.weight
        for _ in range(2):
            actual = torch.func.vmap(gradient, (None, 0))(params, x)
            for name in params:
                assert_close(actual[name], expected[name])
        assert layer.weight is outer


def test_no_value_leaves_its_level() -> None:
    layer, _ = zoo.counted(ours)
    with ours.cached():
        inside = torch.func.grad(lambda x: (layer.weight * x).sum())(torch.ones(3, 3))
        assert_close(inside, layer.weight.detach(), check_dtype=True)
        assert layer.weight.requires_grad
        layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_sharing_inside_a_transform() -> None:
    layer, parametrization = zoo.counted(ours)
    params = dict(layer.named_parameters())

    def twice(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(loop, {f"0.{k}": v for k, v in p.items()}, x).sum()

    loop = nn.Sequential(layer, layer)
    with ours.cached():
        torch.func.grad(twice)(params, torch.ones(1, 3))
    assert parametrization.evaluations == 1


def test_make_fx_gets_its_own_values() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, _ = zoo.counted(ours)
    with ours.cached():
        value = layer.weight
        traced = make_fx(lambda x: layer(x) + layer(x))(torch.ones(1, 3))
        assert layer.weight is value
    assert sum(node.target is torch.ops.aten.tanh.default for node in traced.graph.nodes) == 1


def test_fake_tensors_stay_in_their_mode() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    layer, _ = zoo.counted(ours)
    with ours.cached():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(layer.weight, FakeTensor) and layer.weight is layer.weight
        with FakeTensorMode(allow_non_fake_inputs=True) as other:
            assert layer.weight.fake_mode is other
        assert not isinstance(layer.weight, FakeTensor)


def test_wrapper_subclasses() -> None:
    module = nn.Module()
    inner = torch.randn(2, 2)
    module.weight = nn.Parameter(TwoTensor(inner, inner.clone()))
    ours.register_parametrization(module, "weight", zoo.Counted(lambda x: 2 * x), unsafe=True)
    original = module.parametrizations.weight.original
    with ours.cached():
        assert module.weight is module.weight
        with torch.no_grad():
            original.a.zero_()
        assert torch.equal(module.weight.a, torch.zeros(2, 2))
        with torch.no_grad():
            original.add_(1)
        assert torch.equal(module.weight.a, 2 * torch.ones(2, 2))


def test_sparse_values_and_meta_originals() -> None:
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Counted(Tensor.to_sparse), unsafe=True)
    on_meta = zoo.linear(device="meta")
    ours.register_parametrization(on_meta, "weight", zoo.Symmetric())
    with ours.cached():
        assert layer.weight is layer.weight and layer.weight.is_sparse
        assert on_meta.weight is on_meta.weight


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """Non-strict export runs the region and shares; strict export traces without one."""
    layer = ours.register_parametrization(zoo.linear(), "weight", nn.Tanh())
    model, x = nn.Sequential(layer, layer), torch.ones(1, 3)
    with nullcontext() if strict else ours.cached():
        exported = torch.export.export(model, (x,), strict=strict)
    assert_close(exported.module()(x), model(x))
    assert "0.parametrizations.weight.original" in exported.state_dict
    evaluations = [n for n in exported.graph.nodes if n.target is torch.ops.aten.tanh.default]
    assert len(evaluations) == (2 if strict else 1)
