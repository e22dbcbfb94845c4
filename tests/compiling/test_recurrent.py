"""Compiling torch's recurrent layers, which keep what they read of their weights in a list."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam
from tests import helpers

X = torch.randn(2, 3, 4, dtype=torch.float64)


class Twice(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 4, batch_first=True, dtype=torch.float64)
        for name in ("weight_hh_l0", "weight_ih_l0"):
            fxparam.register_parametrization(self.rnn, name, helpers.Counting())

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        return self.rnn(y, state)[0]  # type: ignore[no-any-return]


def _step(model: nn.Module, run: Any) -> tuple[Tensor, list[Any]]:
    model.zero_grad()
    out = run(X)
    out.square().sum().backward()
    return out, [p.grad for p in model.parameters()]


def _write(*models: nn.Module) -> None:
    with torch.no_grad():
        for model in models:
            for i, p in enumerate(model.parameters()):
                p.add_(0.01 * (i + 1))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("traced", [False, True], ids=["left to eager code", "traced"])
def test_values_gradients_and_copies_follow_the_originals(kind: Any, traced: bool) -> None:
    torch.manual_seed(0)
    model = Twice(kind)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    with torch._dynamo.config.patch(allow_rnn=traced):
        for _ in range(3):
            torch.testing.assert_close(_step(twin, compiled), _step(model, model))
            _write(model, twin)
        copied = copy.deepcopy(twin)
        torch.testing.assert_close(copied(X), model(X))
        _write(model, copied)
        torch.testing.assert_close(_step(copied, copied), _step(model, model))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])  # torch 2.11 does not trace LSTMs
def test_evaluations(kind: Any) -> None:
    """The numbers of docs/limits.md: two tensors in two calls, forward and backward."""

    def counts(run: Any) -> tuple[int, int]:
        run(X).sum().backward()
        run(X).sum().backward()
        return helpers.counted(lambda: run(X).sum().backward())

    model = Twice(kind)
    assert counts(model) == (12, 4)
    compiled = torch.compile(model, backend=fxparam.backend("aot_eager"))
    assert counts(compiled) == (12, 4)
    with fxparam.cached():
        assert helpers.counted(lambda: compiled(X).sum().backward()) == (2, 2)
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        # One evaluation is a guard's, which reads the weight in eager code; one value leaves the
        # graph, as the module keeps it.
        assert counts(torch.compile(model, backend=fxparam.backend("aot_eager"))) == (6, 4)
