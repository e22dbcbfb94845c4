"""The quick check of what an evaluation reads notices what the thorough one does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam
from fxparam.scopes.snapshot import Snapshot
from fxparam.scopes.state import State
from fxparam.scopes.unchanged import Unchanged
from tests import zoo


def _inference_parameter() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.ones(3, 3))


class _Scaled(nn.Module):
    """Holds a number, a tensor outside of its buffers, a buffer and a submodule."""

    shift: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.number, self.text, self.nothing, self.pair = 2.0, "a", None, (1, 2)
        self.plain, self.opaque = torch.ones(3), object()
        self.register_buffer("buffer", torch.ones(3), persistent=False)
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return self.inner(x * self.plain * self.buffer)


def _list(step: nn.Module) -> Any:
    return fxparam.register_parametrization(nn.Linear(3, 3), "weight", step).parametrizations.weight


SAME: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda c: None,
    "a number": lambda c: setattr(c[0], "number", 7),
    "an evaluation": lambda c: c(),
}
WRITTEN: dict[str, Callable[[Any], Any]] = {
    "an original written": lambda c: c.original.detach().add_(1),
    "the memory exchanged": lambda c: setattr(c.original, "data", c.original.data + 1),
    "other rows of the same memory": lambda c: setattr(c.original, "data", c.original.data[:2]),
    "the same memory transposed": lambda c: setattr(c.original, "data", c.original.data.t()),
    "an original frozen": lambda c: c.original.requires_grad_(False),
    "a buffer written": lambda c: c[0].buffer.add_(1),
    "a plain tensor written": lambda c: c[0].plain.add_(1),
    "a parameter below written": lambda c: c[0].inner.weight.detach().add_(1),
    "the training mode": lambda c: c.eval(),
    "the training mode below": lambda c: setattr(c[0].inner, "training", False),
}
OTHER: dict[str, Callable[[Any], Any]] = {
    "an original exchanged": lambda c: setattr(c, "original", nn.Parameter(torch.ones(3, 3))),
    "a dictionary exchanged": lambda c: c[0].__dict__.update(_buffers={"buffer": torch.zeros(3)}),
    "an original without a version": lambda c: torch.utils.swap_tensors(
        c.original, _inference_parameter()
    ),
    "a constant of the class made a tensor": lambda c: setattr(_Scaled, "shift", torch.ones(3)),
    "an opaque object exchanged": lambda c: setattr(c[0], "opaque", object()),
    "a buffer exchanged": lambda c: setattr(c[0], "buffer", torch.zeros(3)),
    "a plain tensor exchanged": lambda c: setattr(c[0], "plain", torch.zeros(3)),
    "nothing made a tensor": lambda c: setattr(c[0], "nothing", torch.zeros(3)),
    "a number made a tensor": lambda c: setattr(c[0], "number", torch.zeros(3)),
    "a tensor more": lambda c: setattr(c[0], "more", torch.zeros(3)),
    "a buffer more": lambda c: c[0].register_buffer("more", torch.zeros(3)),
    "a step more": lambda c: c.append(nn.Tanh()),
    "a module exchanged": lambda c: setattr(c[0], "inner", nn.Linear(3, 3)),
    "a parametrization below": lambda c: fxparam.register_parametrization(
        c[0].inner, "bias", nn.Tanh()
    ),
}


#: What the thorough check does not look at.
ONLY_QUICKLY = {"a constant of the class made a tensor", "an opaque object exchanged"}


@pytest.mark.parametrize(
    ("state", "name"),
    [
        *((State.SAME, name) for name in SAME),
        *((State.WRITTEN, name) for name in WRITTEN),
        *((State.OTHER, name) for name in OTHER),
    ],
)
def test_changes(state: State, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Scaled, "shift", None)
    chain = _list(_Scaled())
    known, thorough = Unchanged.of(chain), Snapshot(chain)
    assert known is not None
    (SAME | WRITTEN | OTHER)[name](chain)
    assert known.compare(chain) is state
    same = state is State.SAME or name in ONLY_QUICKLY
    assert (thorough.compare(chain) is State.SAME) == same


@pytest.mark.parametrize("wrap", [orthogonal, spectral_norm, weight_norm])
def test_what_torch_has_is_checked_quickly(wrap: Any) -> None:
    chain = fxparam.adopt(wrap(nn.Linear(3, 3))).parametrizations.weight
    known = Unchanged.of(chain)
    assert known is not None and known.compare(chain) is State.SAME


class _OnItsClass(nn.Module):
    scale = torch.ones(3)


def _closing_over(held: Any) -> nn.Module:
    class Closing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (held[0] if isinstance(held, list) else held)

    return Closing()


@pytest.mark.parametrize(
    "make",
    [
        lambda: _with(held=[torch.ones(3)]),
        lambda: _with(held={}),
        lambda: _with(held=functools.partial(torch.mul, torch.ones(3))),
        lambda: _with(held=(1, [2])),
        lambda: _closing_over([torch.ones(3)]),
        lambda: _with(held=nn.Parameter(torch.ones(3, device="meta"))),
        lambda: _OnItsClass(),
    ],
)
def test_what_cannot_be_listed(make: Callable[[], nn.Module]) -> None:
    step = make()
    chain = fxparam.register_parametrization(nn.Linear(3, 3), "weight", zoo.Double())
    chain = chain.parametrizations.weight
    chain.append(step)
    assert Unchanged.of(chain) is None


def _with(**attributes: Any) -> nn.Module:
    module = nn.Identity()
    for name, value in attributes.items():
        module.__dict__[name] = value
    return module


def test_what_a_method_closes_over() -> None:
    scale = torch.ones(3)

    class Closing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale

    chain = _list(Closing())
    for change in (lambda: scale.add_(1), lambda: None):
        known = Unchanged.of(chain)
        assert known is not None and known.compare(chain) is State.SAME
        change()
    assert Unchanged.of(chain) is not None
    known = Unchanged.of(chain)
    scale.add_(1)
    assert known is not None and known.compare(chain) is State.WRITTEN
    known = Unchanged.of(chain)
    scale = torch.zeros(3)
    assert known is not None and known.compare(chain) is State.OTHER
