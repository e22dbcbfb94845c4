"""Parametrizations and modules that tests of the eager system share; importable, so they pickle."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Double(nn.Module):
    """Twice the original; has an exact inverse in every floating dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, y: Tensor) -> Tensor:
        return y / 2


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, a: Tensor) -> Tensor:
        return a.triu()


class Skew(nn.Module):
    """No right inverse."""

    def forward(self, x: Tensor) -> Tensor:
        a = x.tril(-1)
        return a - a.mT


class Sum(nn.Module):
    """Several originals, as many as asked for, of which the value is the sum."""

    def __init__(self, terms: int = 2) -> None:
        super().__init__()
        self.terms = terms

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts).sum(0)

    def right_inverse(self, y: Tensor) -> list[Tensor]:
        return [y, *(torch.zeros_like(y) for _ in range(self.terms - 1))]


class Bordered(nn.Module):
    """Keeps what was assigned in a buffer, as orthogonal's trivialization does."""

    base: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", torch.zeros_like(like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base + x

    def right_inverse(self, y: Tensor) -> Tensor:
        self.base = y.clone()
        return torch.zeros_like(y)


class Scaled(nn.Module):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Counted(nn.Module):
    """The given function of the original, counting its evaluations."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.function = function
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return self.function(x)


class Steps(nn.Module):
    """Writes a buffer at each evaluation in training mode, as spectral norm does."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.count += 1
        return x * self.count.clone()


class WithBuffer(nn.Module):
    def __init__(self, value: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("table", value, persistent=persistent)


def maps(forward: Callable[..., Any], inverse: Callable[[Tensor], Any] | None = None) -> nn.Module:
    """A parametrization made of two functions."""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Dropout()

        def forward(self, *x: Tensor) -> Any:
            return forward(*x)

    if inverse is not None:
        Maps.right_inverse = lambda self, y: inverse(y)  # type: ignore[attr-defined]
    return Maps()


def fails(*_: Tensor) -> Any:
    raise ZeroDivisionError("midway")


def same(x: Tensor) -> Tensor:
    return x


def linear(size: int = 3, **kwargs: Any) -> nn.Linear:
    return nn.Linear(size, size, **kwargs)


def counted(api: Any, **kwargs: Any) -> tuple[nn.Linear, Counted]:
    """A layer with a weight that counts its evaluations."""
    layer, parametrization = linear(**kwargs), Counted()
    api.register_parametrization(layer, "weight", parametrization)
    parametrization.evaluations = 0
    return layer, parametrization


def fresh(layer: nn.Module) -> Tensor:
    """``layer.weight`` as a read outside of every region gives it, in a region or not."""
    return contextvars.Context().run(lambda: layer.weight)


def everything(module: nn.Module, *others: nn.Module) -> list[Any]:
    """All that a refused call must leave as it was: compare with ``==``."""
    seen: list[Any] = []
    for root in (module, *others):
        for name, part in root.named_modules():
            seen += [name, id(part), type(part), part.training, sorted(vars(part))]
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            shown = tensor.detach()
            seen += [name, id(tensor), tensor.requires_grad, tensor.dtype, tuple(tensor.shape)]
            seen += [shown.data_ptr(), shown.tolist()]
        seen += list(root.state_dict())
    return seen


def build(api: Any) -> nn.Module:
    """Return a model with parametrized parameters and a parametrized buffer, made by ``api``."""
    model = nn.Sequential(nn.Linear(3, 3), WithBuffer(torch.ones(2), persistent=False))
    api.register_parametrization(model[0], "weight", Symmetric())
    api.register_parametrization(model[0], "weight", Scaled())
    api.register_parametrization(model[0], "bias", Sum(3))
    api.register_parametrization(model[1], "table", Double())
    return model
