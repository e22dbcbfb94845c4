"""In-place writes to the value of a parametrized tensor are lost, which is warned of."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam
from fxparam.eager import lost_writes
from tests import zoo

LOST = "the value of the parametrized tensor 'weight' was written in place"


def registered(layer: Any, step: nn.Module | None = None) -> Any:
    return fxparam.register_parametrization(layer, "weight", step or zoo.Double())


MAKERS: list[Any] = [
    lambda: registered(nn.Linear(3, 3)),
    lambda: registered(nn.Linear(3, 3).requires_grad_(False)),
    lambda: fxparam.adopt(weight_norm(nn.Linear(3, 3))),
    lambda: fxparam.adopt(spectral_norm(nn.Linear(3, 3))),
    lambda: fxparam.adopt(orthogonal(nn.Linear(3, 3))),
    lambda: fxparam.adopt(parametrize.register_parametrization(zoo.linear(), "weight", zoo.Skew())),
]


def with_no_grad(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.ones(3, 3))


def later(layer: Any) -> None:
    value = layer.weight
    init.ones_(value)


def zeroed(module: Any) -> None:
    if isinstance(module, nn.Linear):
        init.zeros_(module.weight)


WRITES: list[Any] = [
    lambda layer: init.constant_(layer.weight, 0.25),
    lambda layer: init.xavier_uniform_(layer.weight),
    lambda layer: init.orthogonal_(layer.weight),
    lambda layer: init.trunc_normal_(layer.weight.T),
    lambda layer: layer.apply(zeroed),
    with_no_grad,
    later,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("write", WRITES)
def test_a_lost_write_is_warned_of(write: Any, make: Any) -> None:
    layer = make()
    with pytest.warns(
        UserWarning, match=rf"{LOST}(.|\n)*fxparam.init_\(module, 'weight', "
    ) as seen:
        write(layer)
    assert seen[0].filename == __file__
    write(layer)  # said once of each tensor


def test_a_lost_write_in_a_region_is_warned_of_when_the_tensor_is_read_again() -> None:
    for region in (fxparam.cached, parametrize.cached):
        layer = registered(nn.Linear(3, 3))
        with region():
            before = layer.weight.detach().clone()
            init.zeros_(layer.weight)
            with pytest.warns(UserWarning, match=LOST):
                assert torch.equal(layer.weight, before)
        layer = registered(nn.Linear(3, 3))
        with pytest.warns(UserWarning, match=LOST), region():
            init.zeros_(layer.weight)


class Changing(nn.Linear):
    """Computes with a value that it writes to."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.helped().clamp_(-1, 1)
        weight = self.helped()
        weight += 1
        return nn.functional.linear(x, weight)

    def helped(self) -> Tensor:
        return self.weight


def initialized(layer: Any) -> None:
    fxparam.init_(layer, "weight", init.eye_)
    layer.weight = torch.eye(3)
    layer.reset_parameters()


def changed(layer: Any) -> None:
    layer.weight.clone().zero_()
    layer.weight.add(1)
    init.zeros_(layer.parametrizations.weight.original)


def trained(layer: Any) -> None:
    values = [layer.weight]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        values.append(layer.weight)
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()


class Kept(nn.Module):
    """Returns a tensor that it keeps, and that others may write to."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = 2 * x
        return self.last


@pytest.mark.parametrize("use", [initialized, changed, trained])
@pytest.mark.parametrize("step", [zoo.Double, zoo.Symmetric])
def test_other_uses_are_left_in_peace(step: Any, use: Any) -> None:
    use(registered(nn.Linear(3, 3), step()))


@pytest.mark.parametrize(
    "step", [zoo.Identity(), zoo.maps(torch.t), zoo.maps(torch.detach), Kept()], ids=str
)
def test_a_write_to_memory_that_lasts_is_left_in_peace(step: nn.Module) -> None:
    layer = registered(nn.Linear(3, 3), step)
    init.constant_(layer.weight, 0.5)
    value = layer.weight
    init.zeros_(layer.parametrizations.weight.original)
    del value


def test_steps_of_a_computation_are_left_in_peace() -> None:
    layer = registered(Changing(3, 3))
    layer(torch.ones(2, 3, requires_grad=True)).sum().backward()
    with torch.no_grad():
        layer(torch.ones(2, 3))
    table = registered(nn.Embedding(3, 3, max_norm=0.1))
    table(torch.arange(3)).sum().backward()


def test_a_tracer_sees_nothing_of_it() -> None:
    layer = registered(nn.Linear(3, 3))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: x @ layer.weight)(
        torch.ones(3, 3)
    )
    assert [n.name for n in traced.graph.nodes if n.op == "call_function"] == ["mul", "mm"]
    assert "detach" not in str(torch.jit.trace(layer, torch.ones(3, 3)).graph)
    torch.func.vmap(lambda x: (layer.weight @ x).sum())(torch.ones(2, 3))


def test_nothing_is_kept_alive() -> None:
    layer = registered(nn.Linear(3, 3))
    gc.collect()
    before = len(lost_writes._watches)
    value = layer.weight
    (watched,) = (w for w in lost_writes._watches if w() is value)
    assert watched.alias.numel() == watched.alias.untyped_storage().nbytes() == 0
    assert watched.alias._version == value._version
    dead = weakref.ref(value)
    del value
    assert dead() is None and len(lost_writes._watches) == before
    value = layer.weight
    del layer
    gc.collect()
    init.zeros_(value)  # nobody is there to read it


def test_reads_of_a_forward_are_not_watched() -> None:
    seen = []

    class Reading(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            value = self.weight
            seen.extend(w for w in lost_writes._watches if w() is value)
            return value

    layer = registered(Reading(3, 3))
    layer(torch.ones(3))
    with fxparam.cached():
        layer(torch.ones(3))
    assert not seen


def test_a_value_that_dies_under_code_without_a_hash() -> None:
    """As Dynamo makes it."""
    layer = registered(nn.Linear(3, 3))

    def write() -> None:
        init.zeros_(layer.weight)

    constants = (*write.__code__.co_consts, {})
    write.__code__ = write.__code__.replace(co_consts=constants)
    with pytest.raises(TypeError, match="unhashable"):
        hash(write.__code__)
    with pytest.warns(UserWarning, match=LOST):
        write()
