"""Loops and regions train under Inductor: no memory of an operand serves another value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fxparam
from tests.graph.torch_bugs import torch_alone


def passed_on(x: Tensor, weight: Tensor) -> Tensor:
    """Backward's carry for what has no gradient is zeros, and read when the loop is over."""
    h = torch.tanh(x @ weight)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x) + 0.5 * weight.detach()
        return h + 0, h.sum()

    return torch_alone.loop(step, h, torch.stack([h, 2 * h, 3 * h]))


@torch.compiler.nested_compile_region
def _residual(h: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(h @ weight) + h


def saved_views(x: Tensor, weight: Tensor) -> Tensor:
    """Backward reads operands of the region, transposed."""
    h = torch.tanh(x @ weight)
    for _ in range(3):
        h = _residual(h, weight)
    return torch.tanh(h @ weight)


@torch.compiler.nested_compile_region
def _activation(h: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(h @ weight)


def saved_and_returned(x: Tensor, weight: Tensor) -> Tensor:
    """The result is what backward needs; the sum may not be made in its memory."""
    h = x
    for _ in range(5):
        h = _activation(h, weight) + h
    return h


def saved_and_returned_in_a_checkpoint(x: Tensor, weight: Tensor) -> Tensor:
    h = x
    for _ in range(3):
        h = checkpoint(lambda h: _activation(h, weight) * weight, h, use_reentrant=False) + h
    return h


PROGRAMS: list[Callable[[Tensor, Tensor], Tensor]] = [
    passed_on,
    saved_views,
    saved_and_returned,
    saved_and_returned_in_a_checkpoint,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_torch_alone_gets_gradients_wrong(program: Callable[[Tensor, Tensor], Tensor]) -> None:
    """By half and more, though donated buffers (``donated_buffers.py``) are off."""
    with torch._functorch.config.patch(donated_buffer=False):
        wrong = torch_alone.error(program, fullgraph=program is passed_on) > 0.1
    file = "fxparam/graph/torch_bugs/memory_of_results.py"
    torch_alone.check(wrong, then=f"{file} may be dropped where no program here needs it")


@pytest.mark.parametrize("program", PROGRAMS)
def test_gradients_are_right_here(program: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert torch_alone.error(program, fxparam.backend()) < 1e-12
