"""The models whose Triton code is looked at: a tied layer that is read several times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["CASES", "SIZE", "Case", "error", "results"]

SIZE = 64


class Parametrization(nn.Module):
    """A function of the original and of parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *parameters: nn.Parameter) -> None:
        super().__init__()
        self.function = function
        self.own = nn.ParameterList(parameters)

    def forward(self, original: Tensor) -> Tensor:
        return self.function(original, *self.own)


def registered(
    function: Callable[..., Tensor], *shapes: tuple[int, int]
) -> Callable[[nn.Linear], nn.Linear]:
    def register(layer: nn.Linear) -> nn.Linear:
        own = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)
        register_parametrization(layer, "weight", Parametrization(function, *own))
        return layer

    return register


def ternary(w: Tensor) -> Tensor:
    """-1, 0 or 1 times a scale; gradients are passed straight through to what is not clipped."""
    scale = w.abs().mean().clamp(min=1e-5).detach()
    clipped = torch.maximum(torch.minimum(w, scale), -scale)
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


class Loop(nn.Module):
    """A layer that a Python loop reads at each step; by hand, once in front of it."""

    def __init__(
        self, parametrize: Callable[[nn.Linear], Any], reads: int, *, by_hand: bool
    ) -> None:
        super().__init__()
        self.layer = parametrize(nn.Linear(SIZE, SIZE, bias=False))
        self.reads, self.by_hand = reads, by_hand

    def forward(self, x: Tensor) -> Tensor:
        once = self.layer.weight if self.by_hand else None
        for _ in range(self.reads):
            x = torch.tanh(F.linear(x, once) if self.by_hand else self.layer(x)) + x / 2
        return x.square().mean()


class Scan(Loop):
    """The same loop as a ``scan``, without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        once = self.layer.weight if self.by_hand else None

        def step(h: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(F.linear(h, once) if self.by_hand else self.layer(h)) + read
            return h, h + 0

        reads = x.new_ones(self.reads, 1, SIZE)
        return torch._higher_order_ops.scan(step, x, reads)[0].square().mean()


class Stack(nn.Module):
    """Layers of one shape, each parametrized alike and read twice."""

    def __init__(
        self, parametrize: Callable[[nn.Linear], Any], layers: int, *, by_hand: bool
    ) -> None:
        super().__init__()
        made = (parametrize(nn.Linear(SIZE, SIZE, bias=False)) for _ in range(layers))
        self.layers, self.by_hand = nn.ModuleList(made), by_hand

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            once = layer.weight if self.by_hand else None
            for _ in range(2):
                x = torch.tanh(F.linear(x, once) if self.by_hand else layer(x)) + x / 2
        return x.square().mean()


@dataclass(frozen=True)
class Case:
    """A model, as it is written and by hand.

    Attributes:
        model: makes it; ``by_hand=True``: each parametrized tensor is read once by hand.
        trains: whether it runs forward and backward.
    """

    model: Callable[..., nn.Module]
    trains: bool = True


def _case(kind: type[nn.Module], parametrize: Any, number: int, *, trains: bool = True) -> Case:
    return Case(lambda *, by_hand: kind(parametrize, number, by_hand=by_hand), trains)


CASES = {
    "orthogonal": _case(Loop, orthogonal, 6),
    "weight norm": _case(Loop, weight_norm, 4),
    "ternary": _case(Loop, registered(ternary), 4),
    "LoRA": _case(Loop, registered(lambda w, a, b: w + 0.5 * (b @ a), (4, SIZE), (SIZE, 4)), 6),
    "spectral norm": _case(Loop, lambda layer: spectral_norm(layer).eval(), 4),
    "softplus": _case(Loop, registered(F.softplus), 4),
    "symmetric": _case(Loop, registered(lambda w: w.triu() + w.triu(1).mT), 4),
    "mask": _case(
        Loop, registered(lambda w: w * (torch.arange(SIZE, device=w.device) % 3 != 0)), 4
    ),
    "scan": _case(Scan, weight_norm, 4, trains=False),
    "batch": _case(Stack, orthogonal, 4),
}


def results(case: Case, model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    """Return the loss, and the gradients of parameters."""
    if not case.trains:
        with torch.no_grad():
            return [run(x)]
    loss = run(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach().clone(), *torch.autograd.grad(loss, parameters)]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error of some results, each as a part of its largest value."""
    pairs = zip(found, exact, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
