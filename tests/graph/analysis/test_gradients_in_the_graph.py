"""A graph that takes gradients itself takes them of each access, as eager code does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from tests.helpers import MatrixExponential

_TRACED = hasattr(torch._dynamo.config, "trace_autograd_ops")


def _two_losses(cell: nn.Module, x: Tensor) -> Any:
    original = cell.parametrizations.weight.original
    first, second = cell(x).square().sum(), cell(x).sin().sum()
    return torch.autograd.grad(first, original)[0], torch.autograd.grad(second, original)[0]


def _of_one_access(cell: nn.Module, x: Tensor) -> Any:
    first, second = cell.weight, cell.weight
    loss = (x @ first @ second).square().sum()
    return torch.autograd.grad(loss, first, materialize_grads=True)


@pytest.mark.skipif(not _TRACED, reason="this torch does not trace autograd")
@pytest.mark.parametrize("body", [_two_losses, _of_one_access])
def test_each_access_has_a_gradient_of_its_own(body: Callable[..., Any]) -> None:
    torch.compiler.reset()
    cell = nn.Linear(3, 3, dtype=torch.float64)
    parametrize.register_parametrization(cell, "weight", MatrixExponential())
    twin, x = copy.deepcopy(cell), torch.randn(2, 3, dtype=torch.float64)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        run = torch.compile(body, backend=fxparam.backend("eager"), fullgraph=True)
        torch.testing.assert_close(run(twin, x), body(cell, x))
