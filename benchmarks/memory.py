"""Measures the most that torch's allocator has given out."""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak"]


def peak(run: Callable[[], object], device: str = "cpu") -> int:
    """Return the bytes given out at most while ``run`` runs, above those before it.

    Exact and the same each time. On the CPU it is read off the events of torch's profiler. What
    libraries take for themselves is not in it.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Without ``acc_events`` torch 2.11 warns of cycles, of which there is one.
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in changes), default=0)
