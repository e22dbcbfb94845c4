"""Loops that Dynamo captured without ``fullgraph=True`` train under Inductor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.map import map as map_op

import fxparam
from tests.graph.torch_bugs import torch_alone

THEN = "allow_scalar_outputs of fxparam/graph/torch_bugs/scalar_outputs.py may be dropped"


def scanned(x: Tensor, weight: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(h * row)
        return h + 0, h * 2

    return torch_alone.loop(step, weight[0], x)


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return map_op(lambda row, w: torch.sin(row * w), x, weight)
    return torch.sin(x[:, None] * weight)


@pytest.mark.parametrize("program", [scanned, mapped])
def test_torch_alone_cannot_compile_them(program: object) -> None:
    raised = torch_alone.message(lambda: torch_alone.error(program))
    assert not raised or "DataDependentOutputException: aten._local_scalar_dense" in raised
    torch_alone.check(bool(raised), then=THEN)


@pytest.mark.parametrize("program", [scanned, mapped])
def test_they_train_here(program: object) -> None:
    assert torch_alone.error(program, fxparam.backend()) < 1e-12


@pytest.mark.parametrize("program", [scanned, mapped])
def test_torch_alone_compiles_them_with_fullgraph(program: object) -> None:
    """And with ``capture_scalar_outputs``, of which that is the default here."""
    assert torch_alone.error(program, fullgraph=True) < 1e-12
