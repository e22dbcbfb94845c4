"""The critic of a GAN under spectral norm, called on real and on fake images in one forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, silu
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]

_PIXELS = 8


class Critic(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        channels = size.width
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(size.layers)
        )

    def score(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = silu(conv(x))
        return x.mean((1, 2, 3))

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(real), self.score(fake)


class ByHand(Critic):
    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        weights = [conv.weight for conv in self.convs]

        def score(x: Tensor) -> Tensor:
            for conv, weight in zip(self.convs, weights, strict=True):
                x = silu(conv2d(x, weight, conv.bias, padding=1))
            return x.mean((1, 2, 3))

        return score(real), score(fake)


def _images(size: Size) -> Inputs:
    shape = (size.batch, size.width, _PIXELS, _PIXELS)
    return torch.randn(shape), torch.randn(shape)


CASES = [
    Case(
        name="gan-critic",
        about="convolutions under spectral norm in training mode, on real and on fake",
        written=Critic,
        by_hand=ByHand,
        inputs=_images,
        grows="layers",
        size=Size(layers=16, width=32, batch=8),
        effects=True,
        scope="cached",
    ),
]
