"""A weight-tied transformer (ALBERT's idea) whose weights have LoRA as a parametrization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]

_TOKENS = 16
_NAMES = ("query", "key", "value", "out", "up", "down")


class LoRA(nn.Module):
    """The original, which does not train, plus a product of two thin matrices."""

    def __init__(self, out: int, into: int, rank: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.b = nn.Parameter(torch.randn(out, rank) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class Block(nn.Module):
    """One block, applied ``layers`` times."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, wide = size.width, 4 * size.width
        self.layers, self.heads = size.layers, max(1, width // 32)
        shapes = [(width, width)] * 4 + [(wide, width), (width, wide)]
        for name, (out, into) in zip(_NAMES, shapes, strict=True):
            layer = nn.Linear(into, out, bias=False)
            layer.weight.requires_grad_(False)
            register_parametrization(layer, "weight", LoRA(out, into))
            setattr(self, name, layer)

    def block(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        query, key, value, out, up, down = weights
        y = layer_norm(x, x.shape[-1:])
        heads = [
            linear(y, w).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for w in (query, key, value)
        ]
        mixed = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + linear(mixed, out)
        return x + linear(gelu(linear(layer_norm(x, x.shape[-1:]), up)), down)

    def weights(self) -> list[Tensor]:
        return [getattr(self, name).weight for name in _NAMES]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = self.block(x, self.weights())
        return x


class ByHand(Block):
    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights()
        for _ in range(self.layers):
            x = self.block(x, weights)
        return x


def _tokens(size: Size) -> Inputs:
    return (torch.randn(size.batch, _TOKENS, size.width),)


CASES = [
    Case(
        name="albert-lora",
        about="one transformer block with LoRA weights, applied many times",
        written=Block,
        by_hand=ByHand,
        inputs=_tokens,
        grows="layers",
        size=Size(layers=16, width=128, batch=4),
    ),
]
