"""Transformers with low-rank updates: weight-tied training (ALBERT) with LoRA, and decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]

_TOKENS = 16
_CONTEXT = 64  # tokens whose keys and values are kept
_HEAD = 32
_NAMES = ("query", "key", "value", "out", "up", "down")


class LoRA(nn.Module):
    """The original, which does not train, plus a product of two thin matrices."""

    def __init__(self, out: int, into: int, rank: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.b = nn.Parameter(torch.randn(out, rank) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class DoRA(LoRA):
    """The same with rows of a norm that is learned apart (https://arxiv.org/abs/2402.09353)."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__(out, into)
        self.magnitude = nn.Parameter(torch.ones(out, 1))

    def forward(self, weight: Tensor) -> Tensor:
        updated = super().forward(weight)
        return self.magnitude * updated / updated.norm(dim=1, keepdim=True)


class Block(nn.Module):
    def __init__(self, width: int, update: type[LoRA]) -> None:
        super().__init__()
        self.head = min(_HEAD, width)
        shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        for name, (out, into) in zip(_NAMES, shapes, strict=True):
            layer = nn.Linear(into, out, bias=False)
            layer.weight.requires_grad_(False)
            register_parametrization(layer, "weight", update(out, into))
            setattr(self, name, layer)

    def weights(self) -> list[Tensor]:
        return [getattr(self, name).weight for name in _NAMES]

    def forward(self, x: Tensor, weights: list[Tensor], kept: Tensor | None = None) -> Tensor:
        """``kept``: keys and values of earlier tokens, ``(2, batch, heads, tokens, features)``."""
        query, key, value, out, up, down = weights
        y = layer_norm(x, x.shape[-1:])
        q, k, v = (
            linear(y, w).unflatten(-1, (-1, self.head)).transpose(1, 2) for w in (query, key, value)
        )
        if kept is not None:
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, out)
        return x + linear(gelu(linear(layer_norm(x, x.shape[-1:]), up)), down)


class Tied(nn.Module):
    """One block, applied ``layers`` times."""

    def __init__(self, size: Size, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.layers = by_hand, size.layers
        self.block = Block(size.width, LoRA)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.block.weights() if self.by_hand else None
        for _ in range(self.layers):
            x = self.block(x, weights or self.block.weights())
        return x


class Decoder(nn.Module):
    """One token through blocks that keep keys and values of those before it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size.width, DoRA) for _ in range(size.layers))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        for block, each in zip(self.blocks, kept, strict=True):
            x = block(x, block.weights(), each)
        return x


def _tokens(size: Size) -> Inputs:
    return (torch.randn(size.batch, _TOKENS, size.width),)


def _token(size: Size) -> Inputs:
    head = min(_HEAD, size.width)
    kept = (size.layers, 2, size.batch, size.width // head, _CONTEXT, head)
    return torch.randn(size.batch, 1, size.width), torch.randn(kept)


CASES = [
    Case(
        name="albert-lora",
        about="one transformer block with LoRA weights, applied 16 times",
        model=Tied,
        inputs=_tokens,
        grows="layers",
        size=Size(layers=16, width=128, batch=4),
    ),
    Case(
        name="dora-decoding",
        about="one token through 4 transformer blocks with DoRA weights, without gradients",
        model=lambda size, by_hand: Decoder(size).eval(),
        inputs=_token,
        grows="layers",
        size=Size(layers=4, width=512, batch=1),
        also=("inductor-freezing", "fxparam-frozen"),
        train=False,
        reads_once=True,
    ),
]
