"""A custom backward that is not additive is run for each access, as in eager code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fxparam
from fxparam.graph import Rule
from tests.helpers import check_against_eager


def _function(backward: Callable[[Tensor, Tensor], Tensor]) -> type[torch.autograd.Function]:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 2 * x

    # Not a closure: Dynamo traces the function itself.
    Doubled.backward = staticmethod(lambda ctx, g: backward(g, *ctx.saved_tensors))
    return Doubled


def _set(zeros: Tensor) -> Tensor:
    zeros[0] = 0.5
    return zeros


BACKWARDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "identity": (lambda g, x: g, True),
    "scaled": (lambda g, x: 2 * g * x, True),
    "masked": (lambda g, x: g * (x.abs() < 1), True),
    "where": (lambda g, x: torch.where(x > 0, g, torch.zeros_like(g)), True),
    "product": (lambda g, x: (g @ x.mT + x.mT @ g).tril() - g.mT, True),
    "zero": (lambda g, x: torch.zeros_like(g), True),
    "joined, by keyword": (lambda g, x: torch.cat(tensors=[g[:1], g[1:]]), True),
    "clipped": (lambda g, x: g.clamp(-0.1, 0.1), False),
    "normalised": (lambda g, x: g / (g.norm() + 1), False),
    "affine": (lambda g, x: g * 2 + 1, False),
    "affine in x": (lambda g, x: g + x, False),
    "affine in x, by keyword": (lambda g, x: torch.add(g, other=x), False),
    "squared": (lambda g, x: g * g, False),
    "sign": (lambda g, x: g.sign(), False),
    "constant": (lambda g, x: x, False),
    "over itself": (lambda g, x: g / g, False),
    "rounded down": (lambda g, x: torch.div(g, 0.25, rounding_mode="floor"), False),
    "rounded by a cast": (lambda g, x: (4 * g).to(torch.int64).to(g.dtype), False),
    "rounded to float32": (lambda g, x: g.to(torch.float32).to(g.dtype), False),
    "overflowing in float16": (lambda g, x: (3e4 * g).half().double(), False),
    "padded with ones": (lambda g, x: nn.functional.pad(g[1:], (0, 0, 1, 0), value=1.0), False),
    "zeros that are filled": (lambda g, x: torch.zeros_like(g).fill_(0.5), False),
    "zeros that are set": (lambda g, x: _set(torch.zeros_like(g)), False),
    "in place": (lambda g, x: g.clone().clamp_(-0.1, 0.1), False),
}


class Chain(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Model(nn.Module):
    def __init__(self, name: str, *, checkpointed: bool) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3, dtype=torch.float64)
        chain = Chain(_function(BACKWARDS[name][0]))
        parametrize.register_parametrization(self.cell, "weight", chain)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(self.cell, x, use_reentrant=False) if self.checkpointed else self.cell(x)
        return x


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", BACKWARDS)
def test_shared_where_additive(name: str, checkpointed: bool) -> None:
    torch.compiler.reset()
    model = Model(name, checkpointed=checkpointed)
    fx = fxparam.backend("aot_eager")
    x = torch.randn(2, 3, dtype=torch.float64)
    check_against_eager(model, fx, x)
    assert fx.last_report is not None
    (entry,) = fx.last_report.entries
    assert entry.evaluations == (1 if BACKWARDS[name][1] else 3)
    if not BACKWARDS[name][1]:
        # An assignment to an element is not seen through, and refused before that.
        rule = Rule.UNKNOWN if name == "zeros that are set" else Rule.NOT_ADDITIVE
        assert rule in {refusal.rule for refusal in entry.refused}


@torch.compiler.allow_in_graph
class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.05, 0.05)


class _Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Hidden.apply(x)


def test_a_function_that_the_graph_does_not_show_stays_in_a_body() -> None:
    torch.compiler.reset()
    cell = nn.Linear(3, 3, dtype=torch.float64)
    parametrize.register_parametrization(cell, "weight", _Opaque())
    twin, rows = copy.deepcopy(cell), torch.randn(4, 3, dtype=torch.float64)
    run = torch.compile(
        lambda rows: torch_map(lambda row: torch.tanh(twin(row)), rows),
        backend=fxparam.backend("aot_eager"),
    )
    run(rows).sum().backward()
    torch.stack([torch.tanh(cell(row)) for row in rows]).sum().backward()
    for actual, expected in zip(twin.parameters(), cell.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("name", ["clipped", "affine"])
def test_without_gradients_it_does_not_matter(name: str) -> None:
    torch.compiler.reset()
    model = copy.deepcopy(Model(name, checkpointed=False))
    fx = fxparam.backend("aot_eager")
    with torch.no_grad():
        torch.compile(model, backend=fx)(torch.randn(2, 3, dtype=torch.float64))
    assert fx.last_report is not None
    assert fx.last_report.entries[0].evaluations == 1
