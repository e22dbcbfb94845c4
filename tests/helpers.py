"""Shared by the tests: parametrizations that count, and a comparison of two ways to run a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

COUNTS = {"forward": 0, "backward": 0}


@torch.library.custom_op("fxparam_test::count", mutates_args=())
def count(x: Tensor) -> Tensor:
    """The identity, counting its runs: declared pure, so that it may be shared."""
    COUNTS["forward"] += 1
    return x.clone()


@count.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxparam_test::count_backward", mutates_args=())
def count_backward(grad: Tensor) -> Tensor:
    COUNTS["backward"] += 1
    return grad.clone()


@count_backward.register_fake
def _(grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.fxparam_test.count_backward(grad)


count.register_autograd(_backward)


class Counting(nn.Module):
    """A parametrization that is the identity and counts."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fxparam_test.count(x)


class LowRank(nn.Module):
    """LoRA's shape: the original plus a product of two thin matrices."""

    def __init__(self, size: int, rank: int = 2) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(size, rank) * 0.1)
        self.b = nn.Parameter(torch.randn(rank, size) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a @ self.b


class MatrixExponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matrix_exp(x)


class RandomMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


class Loop(nn.Module):
    """A recurrent cell that reads its parametrized weight at each of ``steps`` steps."""

    def __init__(self, wrap: Callable[[nn.Module], Any], size: int = 5, steps: int = 6) -> None:
        super().__init__()
        self.cell = nn.Linear(size, size, dtype=torch.float64)
        wrap(self.cell)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = torch.tanh(self.cell(x))
        return x


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Evaluations, forward and backward, while ``run`` runs."""
    COUNTS.update(forward=0, backward=0)
    run()
    return COUNTS["forward"], COUNTS["backward"]


def check_against_eager(
    model: nn.Module, backend: Any, x: Tensor, *, steps: int = 2, **compile_options: Any
) -> None:
    """Outputs, gradients and buffers equal eager's over a few training steps."""
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, **compile_options)
    for step in range(steps):
        torch.manual_seed(step)
        expected = model(x)
        expected.square().sum().backward()
        torch.manual_seed(step)
        actual = compiled(x)
        actual.square().sum().backward()
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-10, msg=name)
        for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10, msg=name)


def skip_unless_scans_train() -> None:
    """Skip a test that trains through scans which torch learnt to differentiate in 2.13."""
    if torch.__version__ < "2.13":
        pytest.skip("this torch cannot train through these scans")


def shown(gm: torch.fx.GraphModule, name: str = "forward") -> str:
    """Return the code of a graph without blank lines, indentation and what is freed."""
    lines = [line.strip().partition(";")[0] for line in gm.code.splitlines() if line.strip()]
    return "\n".join([lines[0].replace("forward", name), *lines[1:]])
