"""Register, assign, remove: what holds for every shape, dtype, chain and number of originals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.utils.parametrize as torch_parametrize
from hypothesis import given, settings
from torch import Tensor, nn

import fxparam.parametrize as ours

SETTINGS = settings(max_examples=40, deadline=None)


class Scale(nn.Module):
    """Times a power of two, which is exact in every floating dtype."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.factor = 2.0**exponent

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def right_inverse(self, y: Tensor) -> Tensor:
        return y / self.factor


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0) if x.ndim else x

    right_inverse = forward


class Keep(nn.Module):
    """The identity, with a right inverse or without."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Parts(nn.Module):
    """The sum of ``number`` originals, the first of which has it all."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, *parts: Tensor) -> Tensor:
        return sum(parts[1:], parts[0])

    def right_inverse(self, y: Tensor) -> tuple[Tensor, ...]:
        return (y.clone(), *(torch.zeros_like(y) for _ in range(self.number - 1)))


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LINKS = st.one_of(st.builds(Scale, st.integers(-2, 2)), st.builds(Flip))
FIRSTS = st.one_of(LINKS, st.builds(Parts, st.integers(1, 4)))
CHAINS = st.tuples(FIRSTS, st.lists(LINKS, max_size=3)).map(lambda t: [t[0], *t[1]])
KINDS = st.sampled_from(["parameter", "frozen", "buffer"])


@st.composite
def owners(draw: Any) -> nn.Module:
    """A module with a tensor ``w``."""
    data = torch.randn(draw(SHAPES), dtype=draw(DTYPES))
    module, kind = nn.Module(), draw(KINDS)
    if kind == "buffer":
        module.register_buffer("w", data)
    else:
        module.w = nn.Parameter(data, requires_grad=kind == "parameter")
    return module


def register(module: nn.Module, chain: list[nn.Module], api: Any = ours) -> nn.Module:
    for link in chain:
        api.register_parametrization(module, "w", link)
    return module


def applied(chain: list[nn.Module], value: Tensor) -> Tensor:
    """The value after registering ``chain`` link by link: only the first is inverted."""
    for link in chain[1:]:
        value = link(value)
    return value


@SETTINGS
@given(owners(), CHAINS)
def test_registration(module: nn.Module, chain: list[nn.Module]) -> None:
    tensor, value = module.w, module.w.detach().clone()
    register(module, chain)
    expected = applied(chain, value)
    assert torch.equal(module.w, expected)
    assert (module.w.shape, module.w.dtype) == (value.shape, value.dtype)
    assert module.w.requires_grad == tensor.requires_grad
    stored = module.parametrizations.w
    assert list(stored) == chain
    if stored.is_tensor:
        assert stored.original is tensor
    assert all(isinstance(t, nn.Parameter) is isinstance(tensor, nn.Parameter)
               for t in [*stored.parameters(), *stored.buffers()])  # fmt: skip


@SETTINGS
@given(owners(), CHAINS, st.data())
def test_assignment_then_reading(module: nn.Module, chain: list[nn.Module], data: Any) -> None:
    register(module, chain)
    held = [*module.parameters(), *module.buffers()]
    for _ in range(data.draw(st.integers(1, 3))):
        value = torch.randn_like(module.w)
        module.w = value
        assert torch.equal(module.w, value)
    after = [*module.parameters(), *module.buffers()]
    assert len(held) == len(after) and all(a is b for a, b in zip(held, after, strict=True))


@SETTINGS
@given(owners(), CHAINS)
def test_removal_keeps_the_value(module: nn.Module, chain: list[nn.Module]) -> None:
    tensor, cls = module.w, type(module)
    register(module, chain)
    value, one = module.w.detach().clone(), module.parametrizations.w.is_tensor
    ours.remove_parametrizations(module, "w")
    assert torch.equal(module.w, value) and type(module) is cls
    assert (module.w is tensor) or not one
    assert isinstance(module.w, nn.Parameter) is isinstance(tensor, nn.Parameter)
    assert module.w.requires_grad == tensor.requires_grad
    assert list(module.state_dict()) == ["w"] and not hasattr(module, "parametrizations")


@SETTINGS
@given(owners(), st.lists(LINKS, min_size=1, max_size=3))
def test_removal_to_the_original(module: nn.Module, chain: list[nn.Module]) -> None:
    tensor = module.w
    register(module, chain)
    value = module.parametrizations.w.original.detach().clone()
    ours.remove_parametrizations(module, "w", leave_parametrized=False)
    assert module.w is tensor and torch.equal(module.w, value)


@SETTINGS
@given(owners(), CHAINS)
def test_the_same_as_torch(module: nn.Module, chain: list[nn.Module]) -> None:
    twin = copy.deepcopy(module)
    register(module, chain)
    register(twin, chain, torch_parametrize)
    for step in range(3):
        mine, theirs = module.state_dict(), twin.state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine.values(), theirs.values(), strict=True))
        assert torch.equal(module.w, twin.w)
        if step == 0:
            module.w = twin.w = torch.randn_like(module.w)
        if step == 1:
            ours.remove_parametrizations(module, "w")
            torch_parametrize.remove_parametrizations(twin, "w")


@SETTINGS
@given(owners(), CHAINS)
def test_copies(module: nn.Module, chain: list[nn.Module]) -> None:
    register(module, chain)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and torch.equal(twin.w, module.w)
        twin.w = torch.zeros_like(module.w)
        assert torch.equal(twin.w, torch.zeros_like(module.w))
    assert torch.equal(ours.adopt(module).w, module.w)


CHANGES = st.sampled_from(["read", "write", "no_grad", "assign", "append", "train", "region"])


@SETTINGS
@given(owners(), CHAINS, st.lists(CHANGES, max_size=12))
def test_a_region_never_shows(module: nn.Module, chain: list[nn.Module], story: list[str]) -> None:
    """Whatever happens inside ``cached()``, a read gives what one outside would."""
    register(module, chain)
    names = [n for n in ("original", "original0") if hasattr(module.parametrizations.w, n)]
    with ours.cached():
        for event in story:
            if event == "write":
                with torch.no_grad():
                    getattr(module.parametrizations.w, names[0]).add_(1)
            elif event == "assign":
                module.w = torch.randn_like(module.w)
            elif event == "append":
                ours.register_parametrization(module, "w", Keep())
                if len(module.parametrizations.w) > 6:
                    break
            elif event == "train":
                module.train(not module.training)
            with torch.set_grad_enabled(event != "no_grad"):
                value, fresh = module.w, module.parametrizations.w()
                if event == "region":
                    with ours.cached():
                        assert module.w is value
            assert torch.equal(value, fresh) and value.requires_grad == fresh.requires_grad
            if event == "append":
                break  # no right inverse from here on
