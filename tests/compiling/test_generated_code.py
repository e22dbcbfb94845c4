"""What Inductor generates after the pass: no more kernels than for the source hoisted by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.nn.utils import parametrize

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    # A cached kernel is not counted.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch.compiler.reset()


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Mask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(8, 8) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Gated(nn.Module):
    """Reads its weight at each of four elementwise steps, or once."""

    def __init__(self, step: nn.Module, *, by_hand: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        parametrize.register_parametrization(self, "weight", step)
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        once = self.weight if self.by_hand else None
        for _ in range(4):
            weight = once if once is not None else self.weight
            x = torch.tanh(x * weight + weight)
        return x


def _kernels(model: nn.Module, backend: Any, device: str) -> int:
    torch.compiler.reset()
    metrics.reset()
    compiled = torch.compile(model.to(device), backend=backend)
    compiled(torch.randn(8, 8, device=device, requires_grad=True)).sum().backward()
    return metrics.generated_kernel_count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [Softplus, Symmetric, Mask])
def test_no_more_kernels_than_hoisted_by_hand(step: Callable[[], nn.Module], device: str) -> None:
    torch.manual_seed(0)
    ours = _kernels(Gated(step(), by_hand=False), "fxparam", device)
    by_hand = _kernels(Gated(step(), by_hand=True), "inductor", device)
    assert 0 < ours <= by_hand


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_share_compiles_to_the_same_code(device: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(device)
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    x = torch.randn(8, 8, device=device)
    codes = []
    for backend in ("inductor", "fxparam"):
        torch.compiler.reset()
        compiled = torch.compile(copy.deepcopy(model), backend=backend)

        def step(compiled: Any = compiled) -> None:
            compiled(x).square().sum().backward()

        _, code = run_and_get_code(step)
        codes.append([_without_comments(text) for text in code])
    assert codes[0] == codes[1]


def _without_comments(code: str) -> list[str]:
    return [line for line in code.splitlines() if not line.lstrip().startswith("#")]
