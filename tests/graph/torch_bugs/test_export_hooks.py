"""A failed export leaves no hook behind, and models compile as before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam
from fxparam.graph.torch_bugs.export_hooks import buffer_hooks_kept
from tests.graph.torch_bugs import torch_alone

HOOKS: dict[int, Any] = nn.modules.module._global_buffer_registration_hooks


@pytest.fixture(autouse=True)
def hooks() -> Iterator[dict[int, Any]]:
    """Take away what torch leaves behind, for the tests that come after."""
    before = dict(HOOKS)
    yield before
    HOOKS.clear()
    HOOKS.update(before)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Sum(nn.Module):
    """A model that assigns a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + x
        return self.total * 2


def compiles() -> bool:
    compiled = torch.compile(Sum(), backend="eager", fullgraph=True)
    return not torch_alone.message(lambda: compiled(torch.ones(2)))


def test_torch_alone_leaves_a_hook_that_breaks_other_models(hooks: dict[int, Any]) -> None:
    assert compiles()
    torch.compiler.reset()
    assert torch_alone.message(lambda: torch.export.export(Fails(), (torch.ones(2),)))
    left = dict(HOOKS) != hooks
    assert compiles() != left
    torch_alone.check(
        left,
        mended_in="2.13",
        then="buffer_hooks_kept of fxparam/graph/torch_bugs/export_hooks.py may be dropped",
    )


def test_a_failed_export_leaves_no_hook_here(hooks: dict[int, Any]) -> None:
    with pytest.raises(Exception, match="data-dependent|guard"):
        fxparam.export(Fails(), (torch.ones(2),))
    assert hooks == HOOKS
    assert compiles()


def test_hooks_of_the_users_own_stay() -> None:
    """But one that the block itself puts there, and leaves, is taken away."""
    mine = nn.modules.module.register_module_buffer_registration_hook(lambda *_: None)
    before = dict(HOOKS)
    with buffer_hooks_kept():
        nn.modules.module.register_module_buffer_registration_hook(lambda *_: None)
        assert len(HOOKS) == len(before) + 1
    assert before == HOOKS
    mine.remove()


def test_a_hook_that_the_block_takes_away_stays_away() -> None:
    mine = nn.modules.module.register_module_buffer_registration_hook(lambda *_: None)
    with buffer_hooks_kept():
        mine.remove()
    assert mine.id not in HOOKS
