"""Tensor parallelism: ``parallelize_module`` with parametrized modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fxparam
from fxparam.distributed import ParametrizedParallel
from fxparam.parametrizations import orthogonal, spectral_norm, weight_norm
from tests import helpers
from tests.distributed.models import Half, one_step

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Mlp(nn.Module):
    """Reads each of its two weights twice."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = wrap(nn.Linear(8, 16)), wrap(nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.down(torch.tanh(self.up(x)))
        return x


class LowRank(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(layer.out_features, 2) * 0.1)
        self.right = nn.Parameter(torch.randn(2, layer.in_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.left @ self.right


KINDS: dict[str, Callable[[Any], nn.Module]] = {
    "half": lambda m: fxparam.register_parametrization(m, "weight", Half()),
    "orthogonal": lambda m: orthogonal(m, orthogonal_map="matrix_exp"),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "low rank": lambda m: fxparam.register_parametrization(m, "weight", LowRank(m)),
}


def _parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles = {
        "up": ParametrizedParallel(ColwiseParallel()),
        "down": ParametrizedParallel(RowwiseParallel()),
    }
    return parallelize_module(model, mesh, styles)


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _compare(
    model: nn.Module, alone: nn.Module, run: Callable[[Tensor], Tensor], steps: int = 2
) -> None:
    for _ in range(steps):
        model.zero_grad()
        alone.zero_grad()
        output, expected = run(X), alone(X)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(_whole(p.grad), q.grad, msg=lambda m, n=name: f"{n}: {m}")
    for (name, b), c in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(_whole(b), c, msg=lambda m, n=name: f"{n}: {m}")


def check_originals_are_sharded_and_values_placed() -> None:
    for kind, wrap in KINDS.items():
        for backend in (None, "aot_eager"):
            alone = Mlp(wrap)
            model = _parallel(copy.deepcopy(alone))
            assert list(model.state_dict()) == list(alone.state_dict())
            run: Any = model
            if backend is not None:
                torch.compiler.reset()
                run = torch.compile(model, backend=fxparam.backend(backend))
            _compare(model, alone, run)
            with fxparam.cached(alone), fxparam.cached(model):
                _compare(model, alone, model, steps=1)
            # Read last: spectral norm moves at each read.
            up, down = model.up.weight, model.down.weight
            assert isinstance(up, DTensor) and up.placements != down.placements, kind


def check_one_evaluation_in_a_graph() -> None:
    def counted(layer: nn.Module) -> nn.Module:
        fxparam.register_parametrization(layer, "weight", Half())
        return fxparam.register_parametrization(layer, "weight", helpers.Counting())

    model = _parallel(Mlp(counted))
    compiled = torch.compile(model, backend=fxparam.backend("aot_eager"))
    compiled(X).sum().backward()
    assert helpers.counted(lambda: compiled(X).sum().backward()) == (2, 2)


def check_assign_disable_and_remove() -> None:
    alone = Mlp(KINDS["orthogonal"])
    model = _parallel(copy.deepcopy(alone))
    value = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))[0]
    for each in (model, alone):
        torch.manual_seed(2)  # columns that a base lacks are random
        each.up.weight = value
    _compare(model, alone, model)
    torch.manual_seed(2)
    model.up.weight = model.up.weight  # a DTensor
    torch.testing.assert_close(_whole(model.up.weight), alone.up.weight)
    with fxparam.disabled(model), fxparam.disabled(alone):
        torch.testing.assert_close(model(X).shape, alone(X).shape)
        assert model.down.weight.placements == (Shard(1),)
    expected = model(X).detach()
    for layer in (model.up, model.down):
        fxparam.remove_parametrizations(layer, "weight")
    assert isinstance(model.up.weight, nn.Parameter)
    torch.testing.assert_close(model(X), expected)


def check_what_no_style_shards_is_the_first_ranks() -> None:
    torch.manual_seed(dist.get_rank())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = nn.Sequential(orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"), nn.Linear(6, 6))
    fxparam.register_parametrization(layers[1], "weight", LowRank(layers[1]))
    style = ParametrizedParallel(ColwiseParallel())
    parallelize_module(layers, mesh, {"0": style, "1": style})
    weight = layers[0].weight.full_tensor()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(6), atol=1e-5, rtol=0)
    left = [torch.empty(6, 2) for _ in range(dist.get_world_size())]
    dist.all_gather(left, layers[1].parametrizations.weight[0].left.detach())
    assert all(torch.equal(each, left[0]) for each in left)


def nested() -> Mlp:
    made = Mlp(KINDS["half"])
    fxparam.register_parametrization(made.up.parametrizations.weight, "original", Half())
    return made


def check_what_is_refused() -> None:
    with pytest.raises(TypeError, match="ParallelStyle"):
        ParametrizedParallel("columns")  # type: ignore[arg-type]
    model = Mlp(KINDS["half"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match="submodules"):
        parallelize_module(model, mesh, ParametrizedParallel(SequenceParallel()))
    plain = nn.Linear(8, 16)  # without parametrizations, the style itself
    parallelize_module(plain, mesh, ParametrizedParallel(ColwiseParallel()))
    assert isinstance(plain.weight, DTensor)
    for chosen in (nested(), _parallel(Mlp(KINDS["half"]))):
        keys = list(chosen.state_dict())
        with pytest.raises(ValueError, match="cannot be parallelized"):
            parallelize_module(chosen, mesh, {"up": ParametrizedParallel(ColwiseParallel())})
        assert keys == list(chosen.state_dict())
    for wrap in (orthogonal, weight_norm, spectral_norm):
        with pytest.raises(ValueError, match="is a DTensor"):
            wrap(plain)
        assert not fxparam.is_parametrized(plain)


class Gram(nn.Module):
    """Computed from a ``DTensor`` as it is: the product of its rows with all others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ x.mT)


def check_parametrizations_of_dtensors() -> None:
    if torch.__version__ < "2.13":  # Dynamo makes a function of each redistribution there
        return
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        parallelize_module(layers, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        for layer in layers:
            fxparam.register_parametrization(layer, "weight", Gram())
        return layers

    def repeated(layers: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = layers(x)
        return x

    found = {}
    for name in ("eager", "aot_eager", "fxparam"):
        module = made()
        torch.compiler.reset()
        backend = fxparam.backend("aot_eager") if name == "fxparam" else name
        compiled = torch.compile(repeated, backend=backend)

        def run(compiled: Any = compiled, module: Any = module) -> Any:
            output = compiled(module, X)
            output.sum().backward()
            return output.detach()

        step = one_step(module, run, "plain", check=False)
        grads = [_whole(p.grad) for p in module.parameters()]
        found[name] = (run(), grads, step.collectives)
    torch.testing.assert_close(found["fxparam"][:2], found["eager"][:2])
    ours, theirs = found["fxparam"][2], found["aot_eager"][2]
    assert ours["all_gather"] < theirs["all_gather"] and ours["all_reduce"] < theirs["all_reduce"]
    if torch.__version__.startswith("2.13."):
        assert ours == {"all_gather": 5, "all_reduce": 7}
        assert theirs == {"all_gather": 9, "all_reduce": 9}
