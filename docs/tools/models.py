"""The models of the recorded pages; ``make pages`` explains them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.parametrize import register_parametrization


class Vocoder(nn.Module):
    """A WaveNet with weight norm that makes audio sample by sample, from a spectrogram."""

    def __init__(self, channels: int = 32, layers: int = 8, samples: int = 16) -> None:
        super().__init__()
        conv = lambda *sizes: weight_norm(nn.Conv1d(*sizes))  # noqa: E731
        self.first = conv(1, channels, 1)
        self.filters = nn.ModuleList(conv(channels, 2 * channels, 2) for _ in range(layers))
        self.features = nn.ModuleList(conv(80, 2 * channels, 1) for _ in range(layers))
        self.skips = nn.ModuleList(conv(channels, 2 * channels, 1) for _ in range(layers))
        self.last = conv(channels, 1, 1)
        self.samples = samples

    def forward(self, spectrogram: Tensor) -> Tensor:
        past = [
            spectrogram.new_zeros(1, filter.in_channels, 2**i)
            for i, filter in enumerate(self.filters)
        ]
        sample, made = spectrogram.new_zeros(1, 1, 1), []
        for t in range(self.samples):
            sample = self.next_sample(sample, spectrogram[:, :, t : t + 1], past)
            made.append(sample)
        return torch.cat(made, dim=2)

    def next_sample(self, sample: Tensor, frame: Tensor, past: list[Tensor]) -> Tensor:
        x, out = self.first(sample), 0
        layers = zip(self.filters, self.features, self.skips, strict=True)
        for i, (filter, feature, skip) in enumerate(layers):
            pair = torch.cat([past[i][:, :, :1], x], dim=2)
            past[i] = torch.cat([past[i][:, :, 1:], x], dim=2)
            a, b = (filter(pair) + feature(frame)).chunk(2, dim=1)
            residual, part = skip(torch.tanh(a) * torch.sigmoid(b)).chunk(2, dim=1)
            x, out = x + residual, out + part
        return torch.tanh(self.last(F.relu(out)))


class LoRA(nn.Module):
    """A trained product of two thin matrices on top of a frozen weight."""

    def __init__(self, rows: int, columns: int, rank: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class Transformer(nn.Module):
    """ALBERT's scheme: one block with LoRA weights is applied 12 times."""

    def __init__(self, width: int = 64, times: int = 12) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.qkv, self.out, self.up, self.down):
            layer.weight.requires_grad_(False)
            register_parametrization(layer, "weight", LoRA(*layer.weight.shape))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.attend(self.norm(x))
            x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x

    def attend(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class RNN(nn.Module):
    """A recurrent network with an orthogonal weight, stepped by ``scan``."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.read = nn.Linear(1, size)
        self.cell = orthogonal(nn.Linear(size, size, bias=False))
        self.classify = nn.Linear(size, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        def step(h: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.read(pixel) + self.cell(h))
            return h, h + 0

        h = pixels.new_zeros(pixels.shape[0], self.cell.in_features)
        scan: Callable[..., tuple[Tensor, Tensor]] = torch._higher_order_ops.scan
        return self.classify(scan(step, h, pixels.T.unsqueeze(-1))[0])


def vocoder() -> tuple[nn.Module, Tensor]:
    return Vocoder(), torch.randn(1, 80, 16)


def transformer() -> tuple[nn.Module, Tensor]:
    return Transformer(), torch.randn(2, 16, 64)


def rnn() -> tuple[nn.Module, Tensor]:
    return RNN(), torch.randn(4, 64)
