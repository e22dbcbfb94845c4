"""Tracing torch's recurrent layers, whose weights are read three times in each call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from tests import helpers

X = torch.randn(2, 3, 4, dtype=torch.float64)
LAYERS = pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
REGISTER = {"torch": parametrize.register_parametrization, "ours": fxparam.register_parametrization}


class Twice(nn.Module):
    """Two layers with a parametrized weight each, called twice in a row."""

    def __init__(self, kind: Any, register: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 4, num_layers=2, batch_first=True, dtype=torch.float64)
        for name in ("weight_hh_l0", "weight_ih_l1"):
            register(self.rnn, name, helpers.Counting())

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        return self.rnn(y, state)[0]  # type: ignore[no-any-return]


def _trained(model: nn.Module, run: nn.Module, x: Tensor) -> tuple[Tensor, list[Any]]:
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return out, [p.grad for p in model.parameters()]


@pytest.fixture(autouse=True)
def _skip_where_torch_fails(request: pytest.FixtureRequest) -> None:
    if request.getfixturevalue("kind") is nn.LSTM and torch.__version__ < "2.12":
        pytest.skip("this torch does not trace LSTMs")


@LAYERS
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
def test_each_weight_is_evaluated_once(kind: Any, register: Any) -> None:
    torch.manual_seed(0)
    model = Twice(kind, register)
    twin = copy.deepcopy(model)
    flat = list(twin.rnn._flat_weights)
    gm = fxparam.symbolic_trace(twin, example_inputs=(X,))
    assert all(map(lambda a, b: a is b, flat, twin.rnn._flat_weights))
    assert helpers.counted(lambda: gm(X).sum().backward()) == (2, 2)
    for x in (X, torch.randn(2, 7, 4, dtype=torch.float64)):
        torch.testing.assert_close(_trained(twin, gm, x), _trained(model, model, x))
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.mul_(0.9)
                q.mul_(0.9)


@LAYERS
def test_copies_and_pickles_of_the_graph(kind: Any) -> None:
    model = Twice(kind, fxparam.register_parametrization)
    gm = fxparam.symbolic_trace(model, example_inputs=(X,))
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), copy.deepcopy(model)):
        torch.testing.assert_close(_trained(twin, twin, X), _trained(model, model, X))
