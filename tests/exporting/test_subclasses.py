"""Parametrizations that return tensor subclasses: folded to plain values, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxparam
from tests import zoo


def plain(value: Any) -> Any:
    return value.q.to(value.s.dtype) * value.s if isinstance(value, Packed) else value


class Packed(torch.Tensor):
    """Integers and a scale, of which most operations compute with the product."""

    q: Tensor
    s: Tensor
    #: What its transpose, which a product is computed with, is multiplied by.
    factor = 1.0

    @staticmethod
    def __new__(cls, q: Tensor, s: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=s.dtype, device=q.device)

    def __init__(self, q: Tensor, s: Tensor) -> None:
        self.q, self.s = q, s

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "s"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Packed:
        return cls(inner["q"], inner["s"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(func(args[0].q), func(args[0].s))
        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return result * cls.factor if func is torch.ops.aten.t.default else result


class Doubling(Packed):
    factor = 2.0


class Pack(nn.Module):
    def __init__(self, kind: type[Packed] = Packed) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q: Tensor, s: Tensor) -> Tensor:
        return self.kind(q, s)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        s = w.detach().abs().amax(1, keepdim=True) / 127
        return (w / s).round().to(torch.int8), s


class Tagged(torch.Tensor):
    """A subclass that wraps nothing."""


class Tag(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (2 * w).as_subclass(Tagged)  # type: ignore[arg-type]


class Masked(Tag):
    def forward(self, w: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(w))


class Counting(Tag):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, w: Tensor) -> Tensor:
        self.count += 1
        return super().forward(w)


X = torch.linspace(-1, 1, 8).view(2, 4)


def model_with(step: nn.Module) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).requires_grad_(False)
    fxparam.register_parametrization(layer, "weight", step, unsafe=True)
    last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    return nn.Sequential(layer, nn.Tanh(), layer, last)


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize("step", [Pack, Tag])
def test_values_are_folded_to_plain_tensors(step: Any, adopted: bool) -> None:
    model = model_with(step())
    before, expected = zoo.everything(model), model(X)
    if adopted:
        fxparam.adopt(model)
        before = zoo.everything(model)
    program = fxparam.export(model, (X,), fold=True)
    assert zoo.everything(model) == before
    assert_close(program.module()(X), expected.as_subclass(Tensor))
    assert {"0.weight", "3.weight"} <= set(program.state_dict)
    assert not any("original" in key for key in program.state_dict)
    assert all(type(value) in (Tensor, nn.Parameter) for value in program.state_dict.values())
    assert program.state_dict["0.bias"].data_ptr() == model[0].bias.data_ptr()
    assert program.state_dict["3.weight"].requires_grad
    assert not program.state_dict["0.weight"].requires_grad


@pytest.mark.parametrize("step", [Pack, Tag])
def test_without_fold_they_are_named(step: Any) -> None:
    model = model_with(step())
    before = zoo.everything(model)
    kind = "Packed" if step is Pack else "Tagged"
    with pytest.raises(ValueError, match=rf"found: \['0.weight \({kind}\)'\]\n.*fold=True") as info:
        fxparam.export(model, (X,))
    assert isinstance(info.value.__cause__, RuntimeError)  # torch's
    assert zoo.everything(model) == before


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (Masked, "gives another value each time"),
        (Counting, "evaluating it writes"),
        (lambda: Pack(Doubling), "computes another result"),
    ],
)
def test_what_plain_values_cannot_stand_for_is_refused(step: Any, why: str) -> None:
    model = model_with(step())
    before = zoo.everything(model)
    with pytest.raises(ValueError, match=rf"found: 0.weight, of class \w+: .*{why}"):
        fxparam.export(model, (X,), fold=True)
    assert zoo.everything(model) == before


def test_other_failures_are_those_of_torch() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    for fold in (False, True):
        with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
            fxparam.export(Branching(), (X,), fold=fold)
