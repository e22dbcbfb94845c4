"""``cached()`` shares a value while it is right, and never longer."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.testing import assert_close

import fxparam.parametrize as ours
from fxparam.scopes import store
from tests import zoo

# --- sharing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_one_evaluation_a_region(api: Any) -> None:
    layer, parametrization = zoo.counted(api)
    for region in (1, 2):
        with api.cached():
            assert layer.weight is layer.weight
            layer(torch.ones(1, 3)).sum().backward()
        assert parametrization.evaluations == region
    assert layer.weight is not layer.weight


def test_as_a_decorator() -> None:
    layer, parametrization = zoo.counted(ours)

    @ours.cached()
    def twice(times: int) -> bool:
        return layer.weight is layer.weight and (times == 0 or twice(times - 1))

    assert twice(2) and parametrization.evaluations == 1
    assert twice(0) and parametrization.evaluations == 2


def test_nested_regions_are_one() -> None:
    layer, parametrization = zoo.counted(ours)
    with ours.cached():
        with ours.cached():
            inner = layer.weight
        assert layer.weight is inner
    assert parametrization.evaluations == 1 and not store.active


def test_two_tensors_and_two_modules() -> None:
    (a, _), (b, _) = zoo.counted(ours), zoo.counted(ours)
    ours.register_parametrization(a, "bias", zoo.Double())
    with ours.cached():
        assert a.weight is a.weight and a.bias is a.bias and b.weight is b.weight
        assert a.weight is not b.weight


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_effects_happen_once_a_region(api: Any) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Steps())
    steps = layer.parametrizations.weight[0]
    before = steps.count.item()
    with api.cached():
        assert layer.weight is layer.weight
    assert steps.count.item() == before + 1


def test_spectral_norm_iterates_once_a_region() -> None:
    layer = ours.adopt(spectral_norm(nn.Linear(4, 4)))
    norm, iterations = layer.parametrizations.weight[0], []
    norm.register_forward_hook(lambda *_: iterations.append(norm._u.clone()))
    with ours.cached():
        first = layer.weight
        assert layer.weight is first and torch.equal(norm._u, iterations[0])
    assert layer.weight is not first and len(iterations) == 2


def test_a_random_mask_is_drawn_once_a_region() -> None:
    layer = zoo.linear(8)
    ours.register_parametrization(layer, "weight", nn.Dropout(0.5))
    with ours.cached():
        assert torch.equal(layer.weight, layer.weight)
    assert not torch.equal(layer.weight, layer.weight)


# --- never stale ------------------------------------------------------------------------------


def write_original(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1)


def write_through_a_view(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.parametrizations.weight.original[0].mul_(2)


def step_an_optimizer(layer: nn.Module) -> None:
    original = layer.parametrizations.weight.original
    original.grad = torch.ones_like(original)
    torch.optim.SGD([original], lr=1.0).step()
    original.grad = None


def exchange_the_data(layer: nn.Module) -> None:
    layer.parametrizations.weight.original.data = torch.full((3, 3), 0.25)


def exchange_the_original(layer: nn.Module) -> None:
    layer.parametrizations.weight.original = nn.Parameter(torch.full((3, 3), 0.25))


def load(layer: nn.Module) -> None:
    layer.load_state_dict({k: torch.full_like(v, 0.5) for k, v in layer.state_dict().items()})


def load_by_assigning(layer: nn.Module) -> None:
    state = {k: torch.full_like(v, 0.5) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def change_the_dtype(layer: nn.Module) -> None:
    layer.double()


def write_the_parametrization(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.parametrizations.weight[1].scale.add_(1)


def append(layer: nn.Module) -> None:
    ours.register_parametrization(layer, "weight", zoo.Skew())


def exchange_a_parametrization(layer: nn.Module) -> None:
    layer.parametrizations.weight[0] = zoo.Skew()


def write_the_value(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.zero_()


def freeze(layer: nn.Module) -> None:
    layer.requires_grad_(False)


CHANGES = [
    write_original,
    write_through_a_view,
    step_an_optimizer,
    exchange_the_data,
    exchange_the_original,
    load,
    load_by_assigning,
    change_the_dtype,
    write_the_parametrization,
    append,
    exchange_a_parametrization,
    pytest.param(
        write_the_value,
        marks=pytest.mark.filterwarnings("ignore:the value of the parametrized tensor 'weight'"),
    ),
    freeze,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: getattr(f, "__name__", None))
def test_a_change_inside_the_region_is_seen(change: Callable[[nn.Module], None]) -> None:
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Counted())
    ours.register_parametrization(layer, "weight", zoo.Scaled())
    with ours.cached():
        _ = layer.weight
        change(layer)
        value = layer.weight
        expected = zoo.fresh(layer)
        assert torch.equal(value, expected) and value.dtype == expected.dtype
        assert value.requires_grad == expected.requires_grad
        assert layer.weight is value


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_a_write_to_an_original_beside_torch(api: Any) -> None:
    layer, _ = zoo.counted(api)
    with api.cached():
        before = layer.weight.detach().clone()
        write_original(layer)
        stale = torch.equal(layer.weight, before)
    assert stale is (api is torch_parametrize)


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_a_first_read_without_grad_beside_torch(api: Any) -> None:
    layer, _ = zoo.counted(api)
    with api.cached():
        with torch.no_grad():
            assert not layer.weight.requires_grad
        assert layer.weight.requires_grad is (api is ours)


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_functional_call_with_other_originals_beside_torch(api: Any) -> None:
    layer, _ = zoo.counted(api)
    other = {"parametrizations.weight.original": torch.zeros(3, 3), "bias": torch.zeros(3)}
    with api.cached():
        before = layer.weight
        out = torch.func.functional_call(layer, other, torch.ones(1, 3))
        assert torch.equal(out, torch.zeros(1, 3)) is (api is ours)
        assert_close(layer.weight, before)


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_an_assignment_beside_torch(api: Any) -> None:
    layer = zoo.linear()
    api.register_parametrization(layer, "weight", zoo.Symmetric())
    with api.cached():
        _ = layer.weight
        layer.weight = torch.eye(3)
        assert torch.equal(layer.weight, torch.eye(3)) is (api is ours)


def test_a_new_module_at_the_address_of_a_freed_one() -> None:
    """torch's cache knows modules by address, and may meet that of a freed one."""
    with ours.cached():
        for i in range(10):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.full((2,), float(i)))
            ours.register_parametrization(layer, "weight", zoo.Identity(), unsafe=True)
            assert torch.equal(layer.weight, torch.full((2,), float(i)))
            del layer
            gc.collect()


def test_originals_that_are_swapped() -> None:
    """Swapping exchanges what is behind a tensor: same object, possibly the same version."""
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Symmetric())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        # Without a graph, as PyTorch refuses to swap a tensor that one holds.
        with ours.cached(), torch.no_grad():
            _ = layer.weight
            layer.weight = torch.eye(3)
            assert torch.equal(layer.weight, torch.eye(3))
            load(layer)
            assert torch.equal(layer.weight, zoo.fresh(layer))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_an_assignment_that_writes_the_parametrization() -> None:
    layer = ours.adopt(orthogonal(nn.Linear(3, 3)))
    with ours.cached():
        _ = layer.weight
        layer.weight = -torch.eye(3)
        assert_close(layer.weight.detach(), -torch.eye(3))


def test_removal_inside_the_region() -> None:
    for parametrization in (zoo.Double(), zoo.Sum()):
        layer = zoo.linear()
        ours.register_parametrization(layer, "weight", parametrization)
        with ours.cached():
            shared = layer.weight
            before = shared.detach().clone()
            ours.remove_parametrizations(layer, "weight")
            with torch.no_grad():
                layer.weight.zero_()
        assert torch.equal(shared.detach(), before)  # the parameter is not the shared value


def test_the_training_mode_is_part_of_the_value() -> None:
    layer = zoo.linear(8)
    ours.register_parametrization(layer, "weight", nn.Dropout(0.5))
    with ours.cached():
        trained = layer.weight
        layer.eval()
        assert torch.equal(layer.weight, layer.parametrizations.weight.original)
        layer.train()
        assert layer.weight is not trained


def test_a_nested_original() -> None:
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Double())
    chain = layer.parametrizations.weight
    ours.register_parametrization(chain, "original", zoo.Symmetric())
    with ours.cached():
        assert layer.weight is layer.weight
        with torch.no_grad():
            chain.parametrizations.original.original.zero_()
        assert torch.equal(layer.weight, torch.zeros(3, 3))


# --- tensors that are neither parameters, buffers nor plain attributes ---------------------------


def by_closure(table: Tensor) -> Any:
    return lambda x: x * table


def by_default(table: Tensor) -> Any:
    def forward(x: Tensor, by: Tensor = table) -> Tensor:
        return x * by

    return forward


def by_class(table: Tensor) -> Any:
    class Multiplies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.by()

        def by(self) -> Tensor:
            return table

    return Multiplies()


class _Holds(nn.Module):
    """Multiplies by a tensor that it finds in what it was given."""

    def __init__(self, held: Any, find: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.held, self.find = held, find

    def forward(self, x: Tensor) -> Tensor:
        return x * self.find(self.held)


def by_module(table: Tensor) -> Any:
    other = nn.Sequential(zoo.WithBuffer(table))
    return _Holds((other,), lambda held: held[0][0].table)


def by_cycle(table: Tensor) -> Any:
    cycle: list[Any] = [{"t": (table,)}]
    cycle.append(cycle)
    return _Holds(cycle, lambda held: held[1][1][0]["t"][0])


def by_method(table: Tensor) -> Any:
    other = zoo.WithBuffer(table)
    other.multiply = functools.partial(torch.mul, table)
    return _Holds([other.named_buffers, {1: other.multiply}], lambda held: held[1][1](1.0))


HOLDERS = [by_closure, by_default, by_class, by_module, by_cycle, by_method]


@pytest.mark.parametrize("make", HOLDERS, ids=lambda f: f.__name__)
def test_a_write_to_a_tensor_held_elsewhere_is_seen(make: Callable[[Tensor], Any]) -> None:
    table = torch.ones(3, 3)
    part = make(table)
    part = part if isinstance(part, nn.Module) else zoo.Counted(part)
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", part)
    with ours.cached():
        before = layer.weight
        assert layer.weight is before
        table.mul_(2)
        after = layer.weight
        assert torch.equal(after, zoo.fresh(layer)) and not torch.equal(after, before)
        assert layer.weight is after


def test_a_part_that_knows_its_layer_does_not_keep_it_alive() -> None:
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", _Holds([layer], lambda held: held[0].bias))
    gone = weakref.ref(layer)
    with ours.cached():
        assert layer.weight is layer.weight
        with torch.no_grad():
            layer.bias.mul_(2)
        assert torch.equal(layer.weight, zoo.fresh(layer))
        del layer
        gc.collect()
        assert gone() is None


class _WithSlots(nn.Module):
    __slots__ = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = types.MappingProxyType({"shift": torch.ones(3, 3)})

    def forward(self, w: Tensor) -> Tensor:
        return w + self.table["shift"]


def test_what_slots_and_read_only_tables_hold_is_seen() -> None:
    step = _WithSlots()
    layer = ours.register_parametrization(nn.Linear(3, 3), "weight", step)
    with ours.cached():
        before = layer.weight
        step.table["shift"].add_(1)
        torch.testing.assert_close(layer.weight, before + 1)
        step.table = {"shift": torch.zeros(3, 3)}
        torch.testing.assert_close(layer.weight, before - 1)
