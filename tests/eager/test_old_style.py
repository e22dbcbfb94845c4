"""``adopt`` of layers with old-style hooks, of ``torch.nn.utils.weight_norm`` and the like."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import fxparam
from tests import zoo


def old(norm: str, module: nn.Module, name: str = "weight", **options: Any) -> Any:
    """Return ``module`` with an old-style hook, without torch's warning that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(torch.nn.utils, norm)(module, name, **options)


WRAPS: dict[str, Any] = {
    "weight": ("weight_norm", {}),
    "weight, last dim": ("weight_norm", {"dim": 1}),
    "weight, no dim": ("weight_norm", {"dim": None}),
    "spectral": ("spectral_norm", {}),
    "spectral, slow": ("spectral_norm", {"n_power_iterations": 3, "eps": 1e-4}),
}


def codec(wrap: Any) -> tuple[nn.Module, Tensor]:
    """Layers as in a vocoder, one of them twice."""
    inner, up = wrap(nn.Conv1d(3, 3, 3, padding=1)), wrap(nn.ConvTranspose1d(3, 2, 4, 2))
    return nn.Sequential(wrap(nn.Conv1d(2, 3, 3)), nn.Tanh(), inner, inner, up), torch.ones(1, 2, 9)


class OwnNames(nn.Module):
    """Two tensors with names of their own, in one module, and a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.up, self.down_v = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) @ self.up) @ self.down_v


def own_names(wrap: Any) -> tuple[nn.Module, Tensor]:
    return wrap(wrap(OwnNames(), "down_v"), "up"), torch.ones(2, 3)


class Last(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def recurrent(wrap: Any) -> tuple[nn.Module, Tensor]:
    return wrap(wrap(Last(3, 4), "weight_hh_l0"), "weight_ih_l0"), torch.ones(5, 2, 3)


MODELS = [codec, own_names, recurrent]


def made(build: Any, wrap: str, adopted: bool = False) -> tuple[nn.Module, Tensor]:
    """Return a model with hooks that has run, as it was or adopted, and its input."""
    torch.manual_seed(0)
    norm, options = WRAPS[wrap]
    model, x = build(lambda module, name="weight": old(norm, module, name, **options))
    model(x)  # hooks assign a tensor with a history
    return fxparam.adopt(model) if adopted else model, x


def new_name(name: str, wrap: str) -> str:
    """Return the name that a tensor of an old-style model has after adoption."""
    path, _, last = name.rpartition(".")
    tensor, _, part = last.rpartition("_")
    keys = {"g": "original0", "v": "original1"}
    if wrap.startswith("spectral"):
        keys = {"orig": "original", "u": "0._u", "v": "0._v"}
    return f"{path}.parametrizations.{tensor}.{keys[part]}".lstrip(".") if part in keys else name


def training(model: nn.Module, x: Tensor, rename: Any, call: Any) -> dict[str, Tensor]:
    """Train for two steps; return outputs, gradients, parameters and buffers by their new names."""
    seen = {}
    for step in range(2):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        seen[f"y{step}"] = y.detach()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            seen[f"gradient{step} of {rename(name)}"] = parameter.grad.clone()
            parameter.data.sub_(parameter.grad, alpha=0.1)
    model.eval()
    tensors = {rename(name): t for name, t in model.state_dict().items()}
    return {**seen, **tensors, "eval": call(x).detach()}


def compare(build: Any, wrap: str, run: Any = lambda model: model, **tolerance: float) -> None:
    before, x = made(build, wrap)
    after, _ = made(build, wrap, adopted=True)
    expected = training(before, x, lambda name: new_name(name, wrap), before)
    actual = training(after, x, str, run(after))
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert_close(actual[key], tensor, **tolerance, msg=key)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("build", MODELS)
def test_a_converted_model_trains_as_before_to_the_bit(build: Any, wrap: str) -> None:
    if build is recurrent and wrap.startswith("spectral"):
        pytest.skip("torch's LSTM reads a weight several times in a call, as docs/limits.md says")
    compare(build, wrap, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", ["weight", "spectral"])
@pytest.mark.parametrize("build", [codec, own_names])
def test_a_converted_model_compiles(build: Any, wrap: str) -> None:
    backend = fxparam.backend("aot_eager")
    compare(build, wrap, lambda model: torch.compile(model, backend=backend, fullgraph=True))
    assert backend.reports[0].entries


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("build", MODELS)
def test_parameters_and_buffers_are_the_same_objects(build: Any, wrap: str) -> None:
    model, x = made(build, wrap)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model.eval()
    y = model(x)
    assert fxparam.adopt(model) is model
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {new_name(n, wrap): id(t) for n, t in before.items()} == {
        n: id(t) for n, t in after.items()
    }
    assert torch.equal(model(x), y)
    lists = [m for m in model.modules() if isinstance(m, fxparam.ParametrizationList)]
    assert not any(part.training for chain in lists for part in chain.modules())
    once = sorted(map(str, zoo.everything(model)))
    assert sorted(map(str, zoo.everything(fxparam.adopt(model)))) == once


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("wrap", ["weight", "spectral"])
@pytest.mark.parametrize("build", MODELS)
def test_copies_are_whole(build: Any, wrap: str, copied: Any) -> None:
    model, x = made(build, wrap, adopted=True)
    model.eval()
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())
    torch.nn.modules.module.Module.load_state_dict(twin, made(build, wrap)[0].state_dict())


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("build", MODELS)
def test_state_dicts_of_before_load(build: Any, wrap: str) -> None:
    old_one, x = made(build, wrap)
    with torch.no_grad():
        for parameter in old_one.parameters():
            parameter.mul_(1.5).add_(0.25)
    old_one(x)
    model, _ = made(build, wrap, adopted=True)
    state = old_one.state_dict()
    assert model.load_state_dict(state) == ([], [])
    assert torch.equal(model.eval()(x), old_one.eval()(x))
    again, _ = made(build, wrap, adopted=True)
    assert again.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(again.eval()(x), old_one(x))


def test_state_dicts_of_new_style_layers_are_interchanged() -> None:
    for norm in ("weight_norm", "spectral_norm"):
        adopted = fxparam.adopt(old(norm, nn.Linear(3, 2)))
        new = getattr(parametrizations, norm)(nn.Linear(3, 2))
        assert list(adopted.state_dict()) == list(new.state_dict())
        new.load_state_dict(adopted.state_dict())
        assert torch.equal(new.eval().weight, adopted.eval().weight)


def test_a_state_dict_from_before_there_was_a_second_vector_loads() -> None:
    layer = old("spectral_norm", nn.Linear(3, 3))
    layer(torch.ones(1, 3))
    state = layer.state_dict()
    metadata = copy.deepcopy(state._metadata)
    del metadata[""]["spectral_norm"]
    state["weight"], state._metadata = layer.weight.detach().clone(), metadata
    del state["weight_v"]
    adopted = fxparam.adopt(old("spectral_norm", nn.Linear(3, 3)))
    assert adopted.load_state_dict(state) == ([], [])
    assert_close(adopted.eval().weight, layer.weight)


def test_an_optimizer_goes_on() -> None:
    models = []
    for adopt in (lambda model: model, fxparam.adopt):
        model, x = made(codec, "weight")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adopt(model)(x).square().sum().backward()
        optimizer.step()
        models.append(model)
    assert torch.equal(models[1](x), models[0](x))


@pytest.mark.parametrize("wrap", ["weight", "spectral"])
@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("mode", [True, False])
def test_torch_removes_what_was_converted(build: Any, wrap: str, mode: bool) -> None:
    """Models do so to their layers, before inference."""
    models = [made(build, wrap, adopted)[0].train(mode) for adopted in (False, True)]
    remove = getattr(torch.nn.utils, f"remove_{WRAPS[wrap][0]}")
    for model in models:
        for module in model.modules():
            names = {hook.name for hook in module._forward_pre_hooks.values()}
            for name in sorted(names):
                remove(module, name)
    plain, ours = models
    assert type(ours) is type(plain)
    assert not any(m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in ours.modules())
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter, expected.pop(name), rtol=0, atol=0)
    assert not expected


def test_removed_by_us_there_is_no_hook_left() -> None:
    layer = fxparam.adopt(old("weight_norm", nn.Linear(3, 2)))
    fxparam.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    with pytest.raises(ValueError, match="not found"):
        torch.nn.utils.remove_weight_norm(layer)
    old("weight_norm", layer)


def test_a_value_is_shared_in_a_region() -> None:
    for norm in ("weight_norm", "spectral_norm"):
        layer = fxparam.adopt(old(norm, nn.Linear(3, 3)))
        with fxparam.cached():
            assert layer.weight is layer.weight


def test_beside_a_parametrization() -> None:
    layer = old("weight_norm", nn.LSTM(3, 3), "weight_hh_l0")
    parametrizations.weight_norm(layer, "weight_ih_l0")
    x = torch.ones(2, 1, 3)
    expected = layer(x)[0]
    fxparam.adopt(layer)
    assert sorted(layer.parametrizations) == ["weight_hh_l0", "weight_ih_l0"]
    assert_close(layer(x)[0], expected)


def test_what_cannot_be_converted_is_refused_and_nothing_changed() -> None:
    odd = old("weight_norm", nn.Linear(3, 2))
    del odd.weight_g
    odd.weight_g = torch.ones(2, 1)
    model = nn.Sequential(old("weight_norm", nn.Linear(3, 3)), odd)
    before = zoo.everything(model)
    with pytest.raises(ValueError, match=r"not found as such: \['weight_g'\]"):
        fxparam.adopt(model)
    assert zoo.everything(model) == before
    keys = nn.Module()
    keys.keys = nn.Parameter(torch.ones(2, 2))  # type: ignore[assignment]
    with pytest.raises(KeyError, match="cannot be parametrized"):
        fxparam.adopt(old("weight_norm", keys, "keys"))


def test_a_hook_of_another_class_is_left_alone() -> None:
    class Mine(torch.nn.utils.weight_norm.__globals__["WeightNorm"]):  # type: ignore[misc]
        pass

    layer = old("weight_norm", nn.Linear(3, 2))
    key, hook = next(iter(layer._forward_pre_hooks.items()))
    layer._forward_pre_hooks[key] = Mine(hook.name, hook.dim)
    before = zoo.everything(layer)
    assert zoo.everything(fxparam.adopt(layer)) == before
