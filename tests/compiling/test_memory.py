"""Peak memory: a shared value lives longer, and that is all that a hoist may cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.utils.parametrize import register_parametrization
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fxparam
from tests import helpers

_WIDTH = 128
_VALUE = 4 * _WIDTH * _WIDTH  # bytes


class _Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = torch.tril(x, -1)
        a = a - a.mT
        return a @ a + torch.tanh(a)


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(_WIDTH, _WIDTH, bias=False)
        register_parametrization(self.cell, "weight", _Skew())

    def step(self, h: Tensor) -> Tensor:
        return torch.tanh(self.cell(h))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = self.step(x)
        return x


def _saves_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_saves_products)


class _Checkpointed(_Loop):
    extra: ClassVar[dict[str, Any]] = {}

    def segment(self, h: Tensor) -> Tensor:
        return self.step(self.step(h))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = checkpoint(self.segment, x, use_reentrant=False, **self.extra)
        return x


class _Selective(_Checkpointed):
    extra: ClassVar[dict[str, Any]] = {"context_fn": _contexts}


class _Scanned(_Loop):
    def forward(self, x: Tensor) -> Tensor:
        def body(h: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            h = self.step(h)
            return h, h.sum()

        return scan(body, x, torch.zeros(6, 1))[0]


def _peak(model: nn.Module, backend: Any, path: Path) -> int:
    """Bytes, over those at the start, that a training step holds at most.

    From the record of every allocation, which does not hang on what else the process holds.
    """
    torch.compiler.reset()
    step = torch.compile(model, backend=backend)
    x = torch.randn(4, _WIDTH)
    for _ in range(2):
        model.zero_grad()
        step(x).sum().backward()
    model.zero_grad()
    # Without ``acc_events`` torch 2.11 warns of cycles, of which there is one.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
        step(x).sum().backward()
    recorded.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    assert memory
    totals = [e["args"]["Total Allocated"] for e in memory]
    start = totals[0] - memory[0]["args"]["Bytes"]
    return max(totals) - start


@pytest.mark.parametrize("kind", [_Loop, _Checkpointed, _Selective, _Scanned])
def test_a_hoist_costs_one_value_at_most(kind: type[_Loop], tmp_path: Path) -> None:
    if kind is _Scanned:
        helpers.skip_unless_scans_train()
    model = kind()
    written = _peak(model, "aot_eager", tmp_path / "written.json")
    hoisted = _peak(model, fxparam.backend("aot_eager"), tmp_path / "hoisted.json")
    assert hoisted <= written + _VALUE + 4096


def test_what_is_counted_is_the_peak(tmp_path: Path) -> None:
    """As written, a step saves a value for each access; only AOTAutograd's CSE merges them."""
    written = _peak(_Loop(), "eager", tmp_path / "written.json")
    hoisted = _peak(_Loop(), fxparam.backend("eager"), tmp_path / "hoisted.json")
    assert written > hoisted + 5 * _VALUE
