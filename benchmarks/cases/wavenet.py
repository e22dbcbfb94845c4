"""A stack of gated dilated convolutions under weight norm: one training pass, and generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.cases.case import TINY, Case, Inputs, Size

__all__ = ["CASES", "Stack", "window"]

_WINDOW = 32
_DILATIONS = 4  # dilations go 1, 2, 4, 8 and start again


class Layer(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.gated = weight_norm(nn.Conv1d(channels, 2 * channels, 2, dilation=dilation))
        self.mix = weight_norm(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.gated(pad(x, (self.dilation, 0))).chunk(2, 1)
        return x + self.mix(torch.tanh(signal) * torch.sigmoid(gate))

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.gated.weight, self.mix.weight

    def given(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """``forward`` with weights that were read before."""
        gated, mix = weights
        padded = pad(x, (self.dilation, 0))
        y = conv1d(padded, gated, self.gated.bias, dilation=self.dilation)
        signal, gate = y.chunk(2, 1)
        return x + conv1d(torch.tanh(signal) * torch.sigmoid(gate), mix, self.mix.bias)


class Stack(nn.Module):
    """One pass: each weight is read once as it is, and there is nothing to share."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.steps = size.steps
        self.layers = nn.ModuleList(
            Layer(size.width, 2 ** (i % _DILATIONS)) for i in range(size.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Generator(Stack):
    """Each sample comes from a pass over the window of samples before it."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            y = x
            for layer in self.layers:
                y = layer(y)
            x = torch.cat([x[..., 1:], y[..., -1:]], -1)
        return x


class GeneratorByHand(Stack):
    def forward(self, x: Tensor) -> Tensor:
        weights = [layer.weights() for layer in self.layers]
        for _ in range(self.steps):
            y = x
            for layer, given in zip(self.layers, weights, strict=True):
                y = layer.given(y, given)
            x = torch.cat([x[..., 1:], y[..., -1:]], -1)
        return x


def window(size: Size) -> Inputs:
    return (torch.randn(size.batch, size.width, _WINDOW),)


_COMMON: dict[str, Any] = {"inputs": window, "tiny": TINY}
CASES = [
    Case(
        name="wavenet",
        about="a control: weight-normed convolutions that are read once as they are",
        written=Stack,
        by_hand=Stack,
        grows="layers",
        size=Size(layers=16, width=32, batch=8),
        **_COMMON,
    ),
    Case(
        name="wavenet-generate",
        about="the stack generates samples one by one, reading every weight for each",
        written=Generator,
        by_hand=GeneratorByHand,
        grows="steps",
        size=Size(steps=32, layers=4, width=32, batch=8),
        train=False,
        **_COMMON,
    ),
]
