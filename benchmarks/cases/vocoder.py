"""A vocoder like HiFi-GAN's generator under weight norm, in training and at inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.cases.case import Case, Inputs, Size

__all__ = ["CASES"]

_BANDS = 80  # of the spectrogram
_FRAMES = 16
_DILATIONS = (1, 3, 5)


class Residual(nn.Module):
    """Dilated convolutions, each with a residual connection."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        dilations = [_DILATIONS[i % len(_DILATIONS)] for i in range(layers)]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, 3, dilation=d, padding=d)) for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(leaky_relu(x, 0.1))
        return x


class Vocoder(nn.Module):
    """Each stage has half the channels and four times the samples."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, stages = size.width, 2
        self.enter = weight_norm(nn.Conv1d(_BANDS, width, 7, padding=3))
        self.up, self.residual = nn.ModuleList(), nn.ModuleList()
        for _ in range(stages):
            self.up.append(weight_norm(nn.ConvTranspose1d(width, width // 2, 8, 4, padding=2)))
            self.residual.append(Residual(width // 2, size.layers))
            width //= 2
        self.leave = weight_norm(nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for up, residual in zip(self.up, self.residual, strict=True):
            x = residual(up(leaky_relu(x, 0.1)))
        return torch.tanh(self.leave(leaky_relu(x)))


def _spectrogram(size: Size) -> Inputs:
    return (torch.randn(size.batch, _BANDS, _FRAMES),)


CASES = [
    Case(
        name="vocoder",
        about="weight-normed convolutions, each read once: nothing to share",
        model=lambda size, by_hand: Vocoder(size),
        inputs=_spectrogram,
        grows="layers",
        size=Size(layers=6, width=128, batch=4),
        also=("fxparam-no-lower",),
        reads_once=True,
    ),
    Case(
        name="vocoder-inference",
        about="the same without gradients; between calls the weights never change",
        model=lambda size, by_hand: Vocoder(size).eval(),
        inputs=_spectrogram,
        grows="layers",
        size=Size(layers=6, width=256, batch=4),
        also=("inductor-freezing", "fxparam-frozen"),
        train=False,
        reads_once=True,
    ),
]
