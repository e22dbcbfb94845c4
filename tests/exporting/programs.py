"""Models to export, and a comparison of their programs with eager code."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

import fxparam
from tests import helpers, zoo

#: The marks of tests that save, load and decompose programs: torch itself warns there.
IGNORED = [
    pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]


class Cell(nn.Module):
    """A built-in recurrent cell, some steps, and nothing of ``cached()`` in its code."""

    def __init__(self, wrap: Callable[..., Any], *, size: int = 4, steps: int = 3) -> None:
        super().__init__()
        self.cell = nn.RNNCell(size, size, dtype=torch.float64)
        wrap(self.cell, "weight_hh")
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(self.steps):
            h = self.cell(x, h)
        return h


def counting(m: nn.Module, name: str) -> None:
    for step in (helpers.MatrixExponential(), helpers.Counting()):
        parametrize.register_parametrization(m, name, step)


def ours(m: nn.Module, name: str) -> None:
    for step in (helpers.MatrixExponential(), helpers.Counting()):
        fxparam.register_parametrization(m, name, step)


def random_mask(m: nn.Module, name: str) -> None:
    parametrize.register_parametrization(m, name, helpers.RandomMask())


def counts_itself(m: nn.Module, name: str) -> None:
    parametrize.register_parametrization(m, name, zoo.Steps())


def x_of(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def runs_equal(program: ExportedProgram, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and buffers of two calls equal those of a copy of the model."""
    twin, run = copy.deepcopy(model), copy.deepcopy(program).module()
    for _ in range(2):
        torch.manual_seed(0)
        expected = twin(*args, **kwargs)
        torch.manual_seed(0)
        torch.testing.assert_close(run(*args, **kwargs), expected)
    left = run.state_dict()
    for name, buffer in twin.named_buffers():
        if name in left:
            torch.testing.assert_close(left[name], buffer, msg=name)
