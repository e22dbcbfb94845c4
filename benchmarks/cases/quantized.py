"""Linear layers whose weights are quantized, with a gradient that goes straight through.

As large language models are trained: in micro-batches, or under checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from benchmarks.cases.case import Case, Inputs, Size, reader
from benchmarks.cases.recurrent import accumulate, accumulate_by_hand

__all__ = ["CASES"]

_MICRO_BATCHES = 8
_BLOCK = 32
_LARGEST_EXPONENT = 8  # of float8_e4m3fn


class Ternary(nn.Module):
    """BitNet's: -1, 0 or 1 times the mean magnitude (https://arxiv.org/abs/2402.17764)."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.abs().mean(1, keepdim=True) + 1e-6  # of a row
        rounded = (weight / scale).round().clamp(-1, 1) * scale
        return weight + (rounded - weight).detach()


class MXFP8(nn.Module):
    """8 bits an element, and a power of two for each block of a row, as in MX formats."""

    def forward(self, weight: Tensor) -> Tensor:
        blocks = weight.unflatten(-1, (-1, min(_BLOCK, weight.shape[-1])))
        largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        scale = torch.exp2(torch.floor(torch.log2(largest)) - _LARGEST_EXPONENT)
        limit = torch.finfo(torch.float8_e4m3fn).max
        rounded = (blocks / scale).clamp(-limit, limit).to(torch.float8_e4m3fn).to(weight.dtype)
        return weight + ((rounded * scale).flatten(-2) - weight).detach()


class Stack(nn.Module):
    """Residual layers without biases. By hand, they give their weights, or take them."""

    def __init__(self, size: Size, quantizer: type[nn.Module], by_hand: bool = False) -> None:
        super().__init__()
        self.by_hand, width = by_hand, size.width
        self.layers = nn.ModuleList(
            register_parametrization(nn.Linear(width, width, bias=False), "weight", quantizer())
            for _ in range(size.layers)
        )

    def forward(self, x: Tensor | None = None, *weights: Tensor) -> Any:
        if x is None:
            return tuple(layer.weight for layer in self.layers)
        for i, layer in enumerate(self.layers):
            x = x + silu(linear(x, weights[i] if weights else layer.weight))
        return x


class Checkpointed(Stack):
    """As written, each layer runs once more in backward, and quantizes once more."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            weight = reader(layer, self.by_hand)
            x = x + checkpoint(lambda x, w: silu(linear(x, w())), x, weight, use_reentrant=False)
        return x


def _tokens(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width),)


def _micro_batches(size: Size) -> Inputs:
    return tuple(torch.randn(size.batch, size.width) for _ in range(_MICRO_BATCHES))


def _cases(name: str, quantizer: type[nn.Module]) -> list[Case]:
    size = Size(layers=4, width=512, batch=32)
    return [
        Case(
            name=f"{name}-accumulation",
            about=f"{_MICRO_BATCHES} micro-batches through 4 layers with {name} weights",
            model=lambda size, by_hand: Stack(size, quantizer),
            inputs=_micro_batches,
            grows="layers",
            size=size,
            also=("fxparam-step",),
            step=accumulate,
            by_hand_step=accumulate_by_hand,
        ),
        Case(
            name=f"{name}-checkpoint",
            about=f"4 checkpointed layers with {name} weights",
            model=lambda size, by_hand: Checkpointed(size, quantizer, by_hand),
            inputs=_tokens,
            grows="layers",
            size=size,
            also=("fxparam-call",),
        ),
    ]


CASES = [
    *_cases("ternary", Ternary),
    *_cases("mxfp8", MXFP8),
    Case(
        name="ternary-inference",
        about="4 layers with ternary weights, without gradients",
        model=lambda size, by_hand: Stack(size, Ternary).eval(),
        inputs=_tokens,
        grows="layers",
        size=Size(layers=4, width=512, batch=32),
        also=("inductor-freezing", "fxparam-frozen"),
        train=False,
        reads_once=True,
    ),
]
