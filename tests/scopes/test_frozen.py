"""``frozen()`` and ``compile(scope="frozen")``: values live until an original changes."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.testing import assert_close

import fxparam
from fxparam.scopes import frozen
from tests import helpers

GRADIENTS = "whose gradients are recorded"
EFFECTS = "write tensors or draw random numbers"


def _layer() -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    return fxparam.register_parametrization(layer, "weight", helpers.Counting())


class Broken(nn.Module):
    """Reads its weight in three graphs, the second time in eager code."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.layer(x))
        torch._dynamo.graph_break()
        h = eagerly(self.layer, h)
        return self.layer(h)


@torch.compiler.disable
def eagerly(layer: Any, h: Tensor) -> Tensor:
    return layer(h)


def _original(layer: Any) -> Any:
    return layer.parametrizations.weight.original


def _step(layer: Any) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


def _load(layer: Any) -> None:
    state = {k: v + 1 for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)


def _write(layer: Any) -> None:
    _original(layer).add_(1)


def _exchange(layer: Any) -> None:
    layer.parametrizations.weight.original = nn.Parameter(_original(layer) + 1)


def _exchange_data(layer: Any) -> None:
    _original(layer).data = _original(layer).data + 1


def _exchange_parametrization(layer: Any) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer.parametrizations.weight[0] = Twice()


def _append(layer: Any) -> None:
    layer.parametrizations.weight.append(nn.Tanh())


def _register_anew(layer: Any) -> None:
    fxparam.remove_parametrizations(layer, "weight")
    fxparam.register_parametrization(layer, "weight", nn.Tanh())


def _to_float32(layer: Any) -> None:
    layer.float()


CHANGES = [
    _step,
    _load,
    _write,
    _exchange,
    _exchange_data,
    _exchange_parametrization,
    _append,
    _register_anew,
]


@pytest.mark.parametrize("change", [*CHANGES, _to_float32])
def test_a_value_lives_until_something_changes(change: Callable[[Any], None]) -> None:
    layer = _layer()
    x = torch.randn(2, 3, dtype=torch.float64)
    with fxparam.frozen(), torch.no_grad():
        assert helpers.counted(lambda: [layer(x) for _ in range(5)]) == (1, 0)
        assert layer.weight is layer.weight
        change(layer)
        x = x.to(layer.bias.dtype)
        held = layer(x)
        assert layer.weight is layer.weight
    assert_close(held, layer(x).detach())


@pytest.mark.parametrize("change", CHANGES)
def test_calls_of_a_compiled_model_share_a_value(change: Callable[[Any], None]) -> None:
    layer = _layer()
    model = fxparam.compile(Broken(layer), scope="frozen", backend=fxparam.backend("aot_eager"))
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        first, *others = [model(x) for _ in range(4)]
        for other in others:
            assert_close(other, first, rtol=0, atol=0)
        assert helpers.counted(lambda: model(x)) == (0, 0)
        change(layer)
        changed = model(x)
        assert helpers.counted(lambda: model(x)) == (0, 0)
        assert_close(changed, Broken(layer)(x))
    assert not torch.equal(first, changed)


def test_no_graph_is_compiled_anew() -> None:
    layer, graphs = _layer(), []

    def record(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    backend = fxparam.backend(record)
    model = torch.compile(Broken(layer), backend=backend)
    x = torch.randn(2, 3, dtype=torch.float64)
    with fxparam.frozen(layer), torch.no_grad():
        model(x)
        compiled = len(graphs)
        for _ in range(20):
            model(x)
            _step(layer)
    assert len(graphs) == compiled


def test_gradients_are_those_of_a_call() -> None:
    layer = _layer()
    twin = copy.deepcopy(layer)
    model = fxparam.compile(Broken(layer), scope="frozen", backend=fxparam.backend("aot_eager"))
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match=GRADIENTS):
        model(x)
    for _ in range(3):
        loss = model(x).square().sum()
        assert helpers.counted(lambda: loss.backward())[1] == 1  # noqa: B023
        Broken(twin)(x).square().sum().backward()
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad)
        with torch.no_grad():
            assert_close(model(x), Broken(twin)(x))
        _step(layer), _step(twin)


def test_a_block_evaluates_each_time_where_gradients_are_recorded() -> None:
    layer = _layer()
    x = torch.randn(2, 3, dtype=torch.float64)
    with fxparam.frozen(layer):
        with pytest.warns(UserWarning, match=GRADIENTS):
            assert helpers.counted(lambda: layer(layer(x)).sum().backward()) == (2, 2)
        layer(x).sum().backward()
        with fxparam.cached():
            assert layer.weight is layer.weight


@pytest.mark.parametrize(
    "parametrization",
    [nn.Dropout(0.5), None],
    ids=["random mask", "power iteration"],
)
def test_what_has_effects_is_evaluated_each_call(parametrization: nn.Module | None) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4, dtype=torch.float64)
        if parametrization is None:
            return fxparam.adopt(spectral_norm(layer))
        return fxparam.register_parametrization(layer, "weight", parametrization)

    x = torch.randn(2, 4, dtype=torch.float64)
    layer, twin = fresh(), fresh()
    model = fxparam.compile(Broken(layer), scope="frozen", backend=fxparam.backend("aot_eager"))
    with torch.no_grad():
        for again in range(3):
            torch.manual_seed(again)
            if again == 0:
                with pytest.warns(UserWarning, match=EFFECTS):
                    y = model(x)
            else:
                y = model(x)
            torch.manual_seed(again)
            with fxparam.cached():
                assert_close(y, Broken(twin)(x))
        layer, twin = fresh(), fresh()
        with fxparam.frozen(layer):
            torch.manual_seed(3)
            with pytest.warns(UserWarning, match=EFFECTS):
                first = layer(x)
            second = layer(x)
            with fxparam.cached():
                assert layer.weight is layer.weight
        torch.manual_seed(3)
        assert_close((first, second), (twin(x), twin(x)))


def test_an_evaluation_without_effects_in_eval_mode_is_frozen() -> None:
    layer = spectral_norm(nn.Linear(4, 4)).eval()
    with fxparam.frozen(layer), torch.no_grad():
        value = layer.weight
        assert layer.weight is value
        layer.parametrizations.weight.training = True
        layer.parametrizations.weight[0].training = True
        with pytest.warns(UserWarning, match=EFFECTS):
            assert layer.weight is not layer.weight


def test_modes_have_values_of_their_own() -> None:
    layer = _layer()
    with fxparam.frozen(layer):
        with torch.no_grad():
            value = layer.weight
        with torch.inference_mode():
            inferred = layer.weight
            assert inferred.is_inference() and layer.weight is inferred
        with torch.no_grad():
            assert layer.weight is value and not value.is_inference()


def test_other_originals_have_values_of_their_own() -> None:
    layer = _layer()
    other = {"parametrizations.weight.original": _original(layer).detach() * 2}
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x), torch.func.functional_call(layer, other, (x,))
        with fxparam.frozen(layer):
            for _ in range(2):
                assert_close(layer(x), expected[0])
                assert_close(torch.func.functional_call(layer, other, (x,)), expected[1])


def test_what_torch_does_not_count_is_forgotten_on_request() -> None:
    layer = _layer()
    model = fxparam.compile(Broken(layer), scope="frozen", backend=fxparam.backend("aot_eager"))
    x = torch.randn(2, 3, dtype=torch.float64)
    with fxparam.frozen(layer), torch.no_grad():
        stale, before = model(x), layer.weight
        _original(layer).data.mul_(2)
        assert_close(model(x), stale)
        fxparam.invalidate(layer)
        assert layer.weight is not before
        assert_close(model(x), Broken(layer)(x))
    with pytest.raises(TypeError, match="got none"):
        fxparam.invalidate()


def test_copies_and_the_state_of_a_compiled_model() -> None:
    layer = _layer()
    model = fxparam.compile(Broken(layer), scope="frozen", backend=fxparam.backend("aot_eager"))
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        twin = copy.deepcopy(model)
        assert twin.state_dict().keys() == model.state_dict().keys()
        assert helpers.counted(lambda: twin(x))[0] >= 1
        assert helpers.counted(lambda: twin(x)) == (0, 0)
        _write(twin.layer)
        assert_close(model(x), y)
        assert_close(twin(x), Broken(twin.layer)(x))
    assert not model.eval().layer.training and model.training is False


def test_threads_get_one_of_two_values() -> None:
    torch.manual_seed(0)
    layer = fxparam.adopt(orthogonal(nn.Linear(4, 4, dtype=torch.float64)))
    model = fxparam.compile(layer, scope="frozen", backend=fxparam.backend("eager"))
    x = torch.randn(2, 4, dtype=torch.float64)
    weights = [nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2)]
    chain = layer.parametrizations.weight
    with torch.no_grad():
        legal = []
        for weight in weights:
            chain.original = weight
            legal.append(layer(x))
        model(x)
    wrong: list[Tensor] = []

    def serve() -> None:
        with torch.no_grad():
            for _ in range(200):
                y = model(x)
                if not any(torch.allclose(y, each) for each in legal):
                    wrong.append(y)

    def swap() -> None:
        for i in range(200):
            chain._parameters["original"] = weights[i % 2]

    threads = [threading.Thread(target=f) for f in (*[serve] * 7, swap)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_values_go_with_the_model() -> None:
    import gc
    import weakref

    layer = _layer()
    gone = weakref.ref(layer.parametrizations.weight)
    with fxparam.frozen(), torch.no_grad():
        value = weakref.ref(layer.weight)
        del layer
        gc.collect()
        assert gone() is None and value() is None


def test_weight_norm_in_a_server_loop_is_adopted() -> None:
    plain = weight_norm(nn.Linear(3, 3)).eval()
    model = fxparam.compile(plain, scope="frozen", backend=fxparam.backend("aot_eager"))
    x = torch.ones(1, 3)
    with torch.inference_mode():
        assert_close(model(x), plain(x))
        assert_close(model(x), plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fxparam.frozen(plain), torch.no_grad():
            assert plain.weight is plain.weight


# --- without originals ---------------------------------------------------------------------------


def _stack() -> Any:
    torch.manual_seed(0)
    layers = [
        weight_norm(nn.Linear(3, 3)),
        orthogonal(nn.Linear(3, 3)),
        spectral_norm(nn.Linear(3, 3)),
    ]
    fxparam.register_parametrization(layers[0], "bias", nn.Tanh())
    return nn.Sequential(*layers).eval()


def test_originals_give_up_their_memory_and_get_it_back() -> None:
    model, x = _stack(), torch.randn(2, 3)
    twin = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    expected = model(x).detach()
    with fxparam.frozen(model, drop_originals=True):
        assert not any("parametrizations" in name for name in model.state_dict())
        assert all(p.numel() == 0 for name, p in parameters.items() if "original" in name)
        assert type(model[1]) is nn.Linear
        assert_close(model(x), expected)
        assert_close(torch.compile(model, backend="eager")(x), expected)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, p in model.named_parameters():
        assert p is parameters[name]
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert_close(a, b, rtol=0, atol=0, msg=name)
    model.train()(x).sum().backward()
    twin.train()(x).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_a_tied_original_keeps_its_memory() -> None:
    model = _stack()
    model.append(nn.Linear(3, 3, bias=False).eval())
    model[3].weight = model[1].parametrizations.weight.original
    with fxparam.frozen(model, drop_originals=True):
        assert model[3].weight.numel() == 9


def test_training_without_originals_is_refused() -> None:
    model, x = _stack(), torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"found: in training mode are \['1', '1.param"):
        model[1].train()
        with fxparam.frozen(model, drop_originals=True):
            pass
    model.eval()
    before = model.state_dict()
    with fxparam.frozen(model, drop_originals=True):
        model.train()
        with pytest.raises(RuntimeError, match=r"required: model.eval\(\)"):
            model(x)
    for name, value in model.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
    model(x)


def test_evaluations_with_effects_have_no_value_in_place_of_originals() -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand(())

    model = _stack()
    fxparam.register_parametrization(model[1], "weight", Draws())
    with (
        pytest.raises(RuntimeError, match=r"the evaluation of '1.weight'"),
        fxparam.frozen(model, drop_originals=True),
    ):
        pass
    with pytest.raises(TypeError, match="got none"), fxparam.frozen(drop_originals=True):
        pass


def test_what_shares_memory_keeps_it() -> None:
    model = _stack()
    original = model[1].parametrizations.weight.original
    flat = torch.rand(9)
    original.data = flat.view(3, 3)
    shared = model[0].parametrizations.bias.original
    shared.data.share_memory_()
    with fxparam.frozen(model, drop_originals=True):
        pass
    flat.zero_()
    assert not original.any() and shared.is_shared()


def test_submodules_keep_their_order_and_tensors_their_kind() -> None:
    model = _stack()
    model[1].more = nn.Linear(3, 3).eval()
    names = [name for name, _ in model.named_parameters()]
    with torch.inference_mode(), fxparam.frozen(model, drop_originals=True):
        pass
    with fxparam.frozen(model, drop_originals=True):
        twin = copy.deepcopy(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert not model[1].parametrizations.weight.original.is_inference()
    twin.train()(torch.ones(1, 3))


def test_a_layer_alone_is_not_trained_without_its_originals() -> None:
    model = _stack()
    with fxparam.frozen(model, drop_originals=True):
        model[0].train()
        with pytest.raises(RuntimeError, match=r"required: model.eval\(\)"):
            model[0](torch.ones(1, 3))


# --- changes during an evaluation ----------------------------------------------------------------


@pytest.mark.parametrize("held", ["nothing", "a list"])
@pytest.mark.parametrize("change", [_write, _exchange])
def test_a_change_during_the_evaluation(change: Callable[[Any], None], held: str) -> None:
    """As by another thread."""

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.interrupt: Any = None
            self.held = [torch.ones(3)] if held == "a list" else None

        def forward(self, x: Tensor) -> Tensor:
            y = 2 * x
            if self.interrupt is not None:
                interrupt, self.interrupt = self.interrupt, None
                interrupt()
            return y

    layer: Any = fxparam.register_parametrization(nn.Linear(3, 3), "weight", Interrupted())
    layer.parametrizations.weight[0].interrupt = lambda: change(layer)
    with fxparam.frozen(layer), torch.no_grad():
        with pytest.warns(UserWarning, match=EFFECTS):
            _ = layer.weight
        assert_close(layer.weight, 2 * _original(layer))


@pytest.mark.parametrize("where", ["attribute", "list", "closure", "class"])
def test_draws_from_any_generator_are_effects(where: str) -> None:
    generator = torch.Generator()

    class Draws(nn.Module):
        kept: Any = generator if where == "class" else None

        def forward(self, x: Tensor) -> Tensor:
            found = generator if where == "closure" else self.kept
            found = found[0] if isinstance(found, list) else found
            return x * torch.rand(3, 3, generator=found)

    step = Draws()
    if where in ("attribute", "list"):
        step.kept = generator if where == "attribute" else [generator]
    layer = fxparam.register_parametrization(nn.Linear(3, 3), "weight", step)
    with fxparam.frozen(layer), torch.no_grad():
        with pytest.warns(UserWarning, match=EFFECTS):
            first = layer.weight
        assert not torch.equal(first, layer.weight)


@pytest.mark.parametrize("change", [_write, _exchange])
def test_a_change_after_the_evaluation(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another thread, before the value is held."""
    layer, evaluate = _layer(), frozen.evaluate_noting_effects

    def interrupted(*args: Any) -> Any:
        found = evaluate(*args)
        change(layer)
        return found

    with fxparam.frozen(layer), torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(frozen, "evaluate_noting_effects", interrupted)
            _ = layer.weight
        assert_close(layer.weight, _original(layer))


def test_frozen_values_are_inputs_with_one_address() -> None:
    """So that CUDA graphs read them where they are, and do not copy them for each call."""
    added: list[Any] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        added.extend(n for n in gm.graph.nodes if n.name.endswith("_of_region"))
        return gm

    for scope, grad in (("frozen", False), ("frozen", True), ("call", False)):
        torch.compiler.reset()
        added.clear()
        run = fxparam.compile(_layer(), scope=scope, backend=fxparam.backend(inner))
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            run(torch.ones(2, 3, dtype=torch.float64))
        (value,) = added
        assert ("tensor_dict" in value.meta) == (scope == "frozen" and not grad)
