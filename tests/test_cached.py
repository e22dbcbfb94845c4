"""``cached()`` shares a value while it is right, and never longer."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import fxparam.parametrize as ours
from fxparam import _context
from tests import zoo


def counted(api: Any = ours, **kwargs: Any) -> tuple[nn.Linear, zoo.Counted]:
    layer, parametrization = zoo.linear(**kwargs), zoo.Counted()
    api.register_parametrization(layer, "weight", parametrization)
    parametrization.evaluations = 0
    return layer, parametrization


def fresh(layer: nn.Module) -> Tensor:
    """The value a read outside of every region gives, in a region or not."""
    return contextvars.Context().run(lambda: layer.weight)


# --- sharing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_one_evaluation_a_region(api: Any) -> None:
    layer, parametrization = counted(api)
    for region in (1, 2):
        with api.cached():
            assert layer.weight is layer.weight
            layer(torch.ones(1, 3)).sum().backward()
        assert parametrization.evaluations == region
    assert layer.weight is not layer.weight


def test_as_a_decorator() -> None:
    layer, parametrization = counted()

    @ours.cached()
    def twice(times: int) -> bool:
        return layer.weight is layer.weight and (times == 0 or twice(times - 1))

    assert twice(2) and parametrization.evaluations == 1
    assert twice(0) and parametrization.evaluations == 2


def test_nested_regions_are_one() -> None:
    layer, parametrization = counted()
    with ours.cached():
        with ours.cached():
            inner = layer.weight
        assert layer.weight is inner
    assert parametrization.evaluations == 1 and not _context.active


def test_two_tensors_and_two_modules() -> None:
    (a, _), (b, _) = counted(), counted()
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
    u = layer.parametrizations.weight[0]._u
    with ours.cached():
        first, after_first = layer.weight, u.clone()
        assert layer.weight is first
        assert torch.equal(u, after_first)
    _ = layer.weight
    assert not torch.equal(u, after_first)


def test_a_random_mask_is_drawn_once_a_region() -> None:
    layer = zoo.linear(8)
    ours.register_parametrization(layer, "weight", nn.Dropout(0.5))
    with ours.cached():
        assert torch.equal(layer.weight, layer.weight)
    assert not torch.equal(layer.weight, layer.weight)


# --- never stale ------------------------------------------------------------------------------


@contextmanager
def nothing(layer: nn.Module) -> Iterator[None]:
    yield


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


CHANGES = [value for name, value in list(globals().items()) if name.split("_")[0] in {
    "write", "step", "exchange", "load", "change", "append", "freeze"}]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_inside_the_region_is_seen(change: Callable[[nn.Module], None]) -> None:
    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Counted())
    ours.register_parametrization(layer, "weight", zoo.Scaled())
    with ours.cached():
        _ = layer.weight
        change(layer)
        value = layer.weight
        expected = fresh(layer)
        assert torch.equal(value, expected) and value.dtype == expected.dtype
        assert value.requires_grad == expected.requires_grad
        assert layer.weight is value


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_a_write_to_an_original_beside_torch(api: Any) -> None:
    layer, _ = counted(api)
    with api.cached():
        before = layer.weight.detach().clone()
        write_original(layer)
        stale = torch.equal(layer.weight, before)
    assert stale is (api is torch_parametrize)


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_a_first_read_without_grad_beside_torch(api: Any) -> None:
    layer, _ = counted(api)
    with api.cached():
        with torch.no_grad():
            assert not layer.weight.requires_grad
        assert layer.weight.requires_grad is (api is ours)


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_functional_call_with_other_originals_beside_torch(api: Any) -> None:
    layer, _ = counted(api)
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


@pytest.mark.parametrize("api", [ours, torch_parametrize], ids=["ours", "torch"])
def test_a_new_module_at_the_address_of_a_freed_one_beside_torch(api: Any) -> None:
    wrong = 0
    with api.cached():
        for i in range(10):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.full((2,), float(i)))
            api.register_parametrization(layer, "weight", zoo.Identity(), unsafe=True)
            wrong += not torch.equal(layer.weight, torch.full((2,), float(i)))
            del layer
            gc.collect()
            if wrong:
                break
    assert (wrong > 0) is (api is torch_parametrize)


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
            assert torch.equal(layer.weight, fresh(layer))
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


# --- modes ------------------------------------------------------------------------------------

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
            b, expected = layer.weight, fresh(layer)
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
        layer, parametrization = counted()
        with ours.cached():
            _ = layer.weight
            layer.parametrizations.weight.original.zero_()
            assert torch.equal(layer.weight, torch.zeros(3, 3))
    assert parametrization.evaluations == 2


def test_functorch_levels() -> None:
    layer, parametrization = counted()
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
    layer, _ = counted()
    with ours.cached():
        inside = torch.func.grad(lambda x: (layer.weight * x).sum())(torch.ones(3, 3))
        assert_close(inside, layer.weight.detach(), check_dtype=True)
        assert layer.weight.requires_grad
        layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_sharing_inside_a_transform() -> None:
    layer, parametrization = counted()
    params = dict(layer.named_parameters())

    def twice(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(loop, {f"0.{k}": v for k, v in p.items()}, x).sum()

    loop = nn.Sequential(layer, layer)
    with ours.cached():
        torch.func.grad(twice)(params, torch.ones(1, 3))
    assert parametrization.evaluations == 1


def test_make_fx_gets_its_own_values() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, _ = counted()
    with ours.cached():
        value = layer.weight
        traced = make_fx(lambda x: layer(x) + layer(x))(torch.ones(1, 3))
        assert layer.weight is value
    assert sum(node.target is torch.ops.aten.tanh.default for node in traced.graph.nodes) == 1


def test_fake_tensors_stay_in_their_mode() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    layer, _ = counted()
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


# --- threads of execution ---------------------------------------------------------------------


def test_an_exception_leaves_nothing_behind() -> None:
    layer, parametrization = counted()
    with pytest.raises(ZeroDivisionError), ours.cached():
        _ = layer.weight
        raise ZeroDivisionError
    assert not _context.active
    assert layer.weight is not layer.weight
    parametrization.function = lambda x: 1 / 0  # type: ignore[assignment,return-value]
    with ours.cached():
        with pytest.raises(ZeroDivisionError):
            _ = layer.weight
        parametrization.function = torch.tanh
        assert layer.weight is layer.weight


def test_threads_do_not_meet() -> None:
    layer, _ = counted()
    values: dict[str, Any] = {}
    opened, closed = threading.Barrier(2), threading.Barrier(2)

    def other() -> None:
        values["outside"] = layer.weight is layer.weight
        with ours.cached():
            values["inside"] = layer.weight
            opened.wait(10)
        closed.wait(10)

    thread = threading.Thread(target=other)
    with ours.cached():
        mine = layer.weight
        thread.start()
        opened.wait(10)
        closed.wait(10)  # the other region has ended
        assert layer.weight is mine
    thread.join()
    assert values["outside"] is False and values["inside"] is not mine


def test_a_thread_with_a_copied_context_is_outside() -> None:
    layer, _ = counted()
    seen: list[bool] = []
    with ours.cached():
        context = contextvars.copy_context()
        run = lambda: seen.append(layer.weight is layer.weight)  # noqa: E731
        thread = threading.Thread(target=context.run, args=(run,))
        thread.start()
        thread.join()
    assert seen == [False]


def test_tasks_do_not_meet() -> None:
    layer, parametrization = counted()

    async def one() -> Tensor:
        with ours.cached():
            value = layer.weight
            await asyncio.sleep(0)
            assert layer.weight is value
            await asyncio.sleep(0)
        return value

    async def main() -> list[Tensor]:
        return await asyncio.gather(one(), one())

    first, second = asyncio.run(main())
    assert first is not second and parametrization.evaluations == 2


def test_a_task_that_outlives_the_region_that_started_it() -> None:
    layer, _ = counted()

    async def child() -> None:
        with ours.cached():
            inside = layer.weight
            await asyncio.sleep(0.01)
            assert layer.weight is inside  # its own with block still runs
        assert layer.weight is not layer.weight

    async def main() -> None:
        with ours.cached():
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        await task

    asyncio.run(main())


def test_a_generator_closed_elsewhere() -> None:
    layer, _ = counted()

    def values() -> Iterator[Tensor]:
        with ours.cached():
            yield layer.weight

    generator = values()
    context = contextvars.copy_context()
    context.run(next, generator)
    generator.close()  # type: ignore[attr-defined]  # in another context than it ran in
    assert not _context.active and not context.run(lambda: _context.active)


def test_a_region_keeps_no_model_alive() -> None:
    with ours.cached():
        layer, _ = counted()
        _ = layer.weight
        gone = weakref.ref(layer)
        del layer, _
        gc.collect()
        assert gone() is None
