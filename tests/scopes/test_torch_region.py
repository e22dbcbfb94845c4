"""torch's ``parametrize.cached()`` around modules that are ours, and ours around torch's."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxparam
from tests import zoo


def registered() -> tuple[nn.Linear, zoo.Counted]:
    return zoo.counted(fxparam)


def adopted() -> tuple[nn.Linear, zoo.Counted]:
    layer, step = zoo.counted(parametrize)
    fxparam.adopt(layer)
    step.evaluations = 0
    return layer, step


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Any:
    yield
    assert not parametrize._cache_enabled and not parametrize._cache
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [registered, adopted])
def test_a_region_shares_one_evaluation(make: Any) -> None:
    layer, step = make()
    with parametrize.cached():
        value = layer.weight
        assert layer.weight is value
        with parametrize.cached():
            assert layer.weight is value
        assert layer.weight is value
    assert step.evaluations == 1
    with parametrize.cached():
        assert layer.weight is not value
    assert layer.weight is not layer.weight


def test_gradients_are_those_of_plain_reads() -> None:
    layer, step = registered()
    x = torch.ones(2, 3)
    layer(layer(x)).sum().backward()
    expected = layer.parametrizations.weight.original.grad
    layer.zero_grad()
    step.evaluations = 0
    with parametrize.cached():
        layer(layer(x)).sum().backward()
    assert_close(layer.parametrizations.weight.original.grad, expected)
    assert step.evaluations == 1


def test_values_are_not_stale_where_those_of_torch_are() -> None:
    for layer, is_stale in ((zoo.counted(parametrize)[0], True), (registered()[0], False)):
        original = layer.parametrizations.weight.original
        with parametrize.cached():
            with torch.no_grad():
                assert not layer.weight.requires_grad
            assert layer.weight.requires_grad is not is_stale
            before = layer.weight.detach().clone()
            with torch.no_grad():
                original.add_(1)
            assert torch.equal(layer.weight, before) is is_stale
            zeros = {"parametrizations.weight.original": torch.zeros(3, 3)}
            inside = torch.func.functional_call(layer, zeros, torch.ones(1, 3))
            assert torch.equal(inside[0], layer.bias) is not is_stale


def test_the_region_goes_with_its_values() -> None:
    layer, _ = registered()
    with parametrize.cached():
        value = weakref.ref(layer.weight)
        assert value() is not None
    gc.collect()
    assert value() is None


def test_regions_of_both_kinds_nest() -> None:
    layer, step = registered()
    for outer, inner in (
        (parametrize.cached, fxparam.cached),
        (fxparam.cached, parametrize.cached),
    ):
        step.evaluations = 0
        with outer():
            value = layer.weight
            with inner():
                assert layer.weight is value
            assert layer.weight is value
        assert step.evaluations == 1
        with inner():
            assert layer.weight is not value


def test_each_thread_has_values_of_its_own() -> None:
    layer, step = registered()
    seen: list[Tensor] = []
    with parametrize.cached():
        mine = layer.weight
        thread = threading.Thread(target=lambda: seen.extend([layer.weight, layer.weight]))
        thread.start()
        thread.join()
        assert layer.weight is mine
    assert seen[0] is seen[1] is not mine
    assert step.evaluations == 2


@pytest.mark.parametrize("region", [parametrize.cached, fxparam.cached])
def test_a_checkpointed_function_evaluates_at_each_access(region: Any) -> None:
    layer, step = registered()
    x = torch.ones(2, 3, requires_grad=True)
    expected = torch.autograd.grad(layer(layer(x)).sum(), [x, *layer.parameters()])
    step.evaluations = 0
    with region():
        layer.weight.sum()
        y = checkpoint(lambda x: layer(layer(x)), x, use_reentrant=False)
    assert step.evaluations == 3
    assert_close(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), expected)


def test_effects_happen_once() -> None:
    results = []
    for adopt in (lambda layer: layer, fxparam.adopt):
        torch.manual_seed(0)
        layer = adopt(spectral_norm(nn.Linear(3, 3)))
        with parametrize.cached():
            results.append(layer(layer(torch.ones(2, 3))))
    assert torch.equal(*results)


def test_tracing_in_a_region() -> None:
    layer, _ = registered()
    x = torch.ones(1, 3)
    with parametrize.cached():
        layer(x)
        assert_close(fxparam.export(layer, (x,)).module()(x), layer(x))
        with pytest.raises(RuntimeError, match="Cannot trace a model while caching"):
            torch.jit.trace(layer, x)


Run = Callable[[nn.Module, Tensor], Tensor]


def one_region(layer: nn.Module, x: Tensor) -> Tensor:
    with parametrize.cached():
        return layer(layer(x))


def two_regions(layer: nn.Module, x: Tensor) -> Tensor:
    return one_region(layer, one_region(layer, one_region(layer, x)))


def nested(layer: nn.Module, x: Tensor) -> Tensor:
    with parametrize.cached():
        x = one_region(layer, layer(x))
        with fxparam.cached():
            x = layer(x)
        return layer(x)


def in_ours(layer: nn.Module, x: Tensor) -> Tensor:
    with fxparam.cached():
        return layer(one_region(layer, x))


def before_and_after(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(one_region(layer, layer(x)))


def written(layer: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        x = layer(layer(x)).detach()
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(1.5)
        return layer(layer(x))


def in_a_loop(layer: nn.Module, x: Tensor) -> Tensor:
    for _ in range(3):
        with parametrize.cached():
            x = layer(layer(x))
    return x


PROGRAMS = [one_region, two_regions, nested, in_ours, before_and_after, written, in_a_loop]


def result(layer: nn.Module, run: Any) -> list[Tensor]:
    torch.manual_seed(1)
    y = run(layer, torch.ones(2, 3))
    gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    return [y.detach(), *gradients, *layer.buffers()]


def made(wrap: Any) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = fxparam.adopt(wrap(nn.Linear(3, 3)))
    return layer


def masked(layer: nn.Linear) -> nn.Module:
    return fxparam.register_parametrization(layer, "weight", zoo.maps(nn.functional.dropout))


@pytest.mark.parametrize("wrap", [spectral_norm, masked])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_region_in_compiled_code_is_that_of_eager_code(program: Run, wrap: Any) -> None:
    expected = result(made(wrap), program)
    for backend in (fxparam.backend("aot_eager"), "aot_eager"):
        full = isinstance(backend, fxparam.Backend)
        if full and wrap is masked:
            backend = fxparam.backend("eager")  # AOTAutograd draws from the same generator
        torch._dynamo.reset()
        compiled = torch.compile(program, backend=backend, fullgraph=full)
        assert_close(result(made(wrap), compiled), expected)


def test_a_region_in_compiled_code_is_shared_in_the_graph() -> None:
    backend = fxparam.backend("aot_eager")
    torch.compile(two_regions, backend=backend, fullgraph=True)(
        made(spectral_norm), torch.ones(2, 3)
    )
    (entry,) = backend.last_report.entries
    assert (entry.runs_before, entry.runs) == (6, 3)


@pytest.mark.parametrize("wrap", [spectral_norm, weight_norm])
@pytest.mark.parametrize("outer", [parametrize.cached, fxparam.cached])
def test_a_region_around_compiled_code(outer: Any, wrap: Any) -> None:
    def around(call: Any) -> Run:
        def run(layer: nn.Module, x: Tensor) -> Tensor:
            with outer():
                return layer(call(layer, call(layer, x)))

        return run

    for program in (lambda layer, x: layer(layer(x)), one_region):
        torch._dynamo.reset()
        expected = result(made(wrap), around(program))
        compiled = torch.compile(program, backend=fxparam.backend("aot_eager"), fullgraph=True)
        assert_close(result(made(wrap), around(compiled)), expected)


def test_compiled_code_notices_a_region_of_torch() -> None:
    """Compiled outside of one, then called in one, and the other way round."""
    layer = made(spectral_norm)
    compiled = torch.compile(lambda x: layer(layer(x)), backend=fxparam.backend("aot_eager"))
    step: Any = layer.parametrizations.weight[0]
    for region in (nullcontext, parametrize.cached, nullcontext, parametrize.cached):
        step._u.copy_(torch.tensor([1.0, 0, 0]))  # far from where power iterations end
        twin: Any = made(spectral_norm)
        twin.load_state_dict(layer.state_dict())
        with region():
            assert_close(compiled(torch.ones(2, 3)), twin(twin(torch.ones(2, 3))))
        assert_close(step._u, twin.parametrizations.weight[0]._u)


def test_ours_adopts_the_models_it_is_given() -> None:
    first, second = weight_norm(nn.Linear(3, 3)), nn.Sequential(weight_norm(nn.Linear(3, 3)))
    with fxparam.cached(first, second):
        assert first.weight is first.weight
        assert second[0].weight is second[0].weight
        other = weight_norm(nn.Linear(3, 3))
        assert other.weight is not other.weight  # torch's, which reads past our region
    assert isinstance(first.parametrizations.weight, fxparam.ParametrizationList)

    @fxparam.cached(second)
    def decorated() -> bool:
        return second[0].weight is second[0].weight

    assert decorated()
    before = zoo.everything(first)
    refused: Any = nn.Linear
    with (
        pytest.raises(TypeError, match=r"`models\[1\]` must be a torch.nn.Module"),
        fxparam.cached(first, refused),
    ):
        pass
    assert zoo.everything(first) == before


def test_in_compiled_code_ours_adopts_outside_of_the_graph() -> None:
    layer = weight_norm(nn.Linear(3, 3))
    expected = layer(layer(torch.ones(1, 3)))

    @torch.compile(backend=fxparam.backend("aot_eager"))
    def run(x: Tensor) -> Tensor:
        with fxparam.cached(layer):
            return layer(layer(x))

    assert_close(run(torch.ones(1, 3)), expected)
    assert isinstance(layer.parametrizations.weight, fxparam.ParametrizationList)
