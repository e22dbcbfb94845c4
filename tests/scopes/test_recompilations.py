"""Steps of training and inference are compiled once, in whatever scope."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import fxparam


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Broken(nn.Module):
    """Reads two parametrized tensors in three graphs, one of them in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = orthogonal(nn.Linear(3, 3), use_trivialization=False)
        self.out = weight_norm(nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.cell(x))
        torch._dynamo.graph_break()
        x = self.cell(x) + 1
        torch._dynamo.graph_break()
        return self.out(self.cell(x))  # type: ignore[no-any-return]


def _block(scope: str, model: nn.Module) -> AbstractContextManager[Any]:
    if scope == "region":
        return fxparam.cached(model)
    return fxparam.accumulate(model) if scope == "step" else nullcontext()


@pytest.mark.parametrize("scope", ["graph", "region", "call", "frozen", "step"])
def test_twenty_steps_of_training_and_inference(scope: str) -> None:
    model = Broken()
    fxparam.adopt(model)
    compiled: list[Any] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(gm)
        return gm

    own = scope if scope in ("graph", "call", "frozen") else "graph"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a frozen scope of fxparam does not hold")
        run = fxparam.compile(model, scope=own, backend=fxparam.backend(inner))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        counts = [_one_of_each(run, model, optimizer, scope, compiled) for _ in range(20)]
    # Forward under `no_grad` is another graph than in training; after one of each there is no more.
    assert counts == counts[:1] * 20


def _one_of_each(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scope: str,
    compiled: list[Any],
) -> int:
    model.train()
    with _block(scope, model):
        for _ in range(2 if scope == "step" else 1):
            run(torch.randn(4, 3)).square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), nullcontext() if scope == "step" else _block(scope, model):
        run(torch.randn(4, 3))
    return len(compiled)
