"""The instruments: a clock, a memory meter, and a record of what a compilation made."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from benchmarks.programs import Program

__all__ = [
    "Compilation",
    "compilation",
    "free_at_once",
    "graphs_captured",
    "peak_memory",
    "timed_step",
]

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def timed_step(program: Program) -> tuple[float, float | None]:
    """Seconds of one step, and of its forward if the step has one that ends."""
    program.reset()
    return (_timed_on_cuda if program.setting.device == "cuda" else _timed_on_cpu)(program)


def _timed_on_cpu(program: Program) -> tuple[float, float | None]:
    middle: list[float] = []
    start = time.perf_counter()
    program.step(lambda: middle.append(time.perf_counter()))
    end = time.perf_counter()
    return end - start, middle[0] - start if middle else None


def _timed_on_cuda(program: Program) -> tuple[float, float | None]:
    """By events on the stream: waiting in the middle would take the overlap of the halves away."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    halves: list[None] = []

    def forward_done() -> None:
        middle.record()
        halves.append(None)

    torch.cuda.synchronize()
    start.record()
    program.step(forward_done)
    end.record()
    end.synchronize()
    forward = start.elapsed_time(middle) / 1e3 if halves else None
    return start.elapsed_time(end) / 1e3, forward


def free_at_once() -> None:
    """Let glibc give each block of 8 KiB and more back when it is freed; to call at the start.

    Else what is resident depends on the holes that a compilation left in the heap: the peak of one
    program, a few MB, differed by 25 % from process to process, and by 2 % with this. It makes
    compiling 6 to 8 % slower, whatever is compiled.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 8192)


def peak_memory(program: Program, steps: int = 2, repeats: int = 5) -> float | None:
    """Bytes by which a step raises what is in use when it begins, the median of the repeats.

    CUDA: the allocator's high-water mark. CPU: the process's resident high-water mark, which also
    holds torch itself and the traces of a compilation; hence above what is resident before. The
    kernel counts resident pages in batches: of a peak of 1 MB a tenth is noise.
    None where the system does not tell.
    """
    peaks = [_peak(program, steps) for _ in range(repeats)]
    told = [peak for peak in peaks if peak is not None]
    return statistics.median(told) if told else None


def _peak(program: Program, steps: int) -> int | None:
    program.reset()
    gc.collect()
    if program.setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(program, steps)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _forget_high_water():
        return None
    before = _resident("VmRSS")
    _steps(program, steps)
    return _resident("VmHWM") - before


def _steps(program: Program, steps: int) -> None:
    for _ in range(steps):
        program.reset()
        program.step()


def _forget_high_water() -> bool:
    """Give free memory back, and let the resident high-water mark start anew."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(field_name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"{_STATUS} has no {field_name}")


@dataclass
class Compilation:
    """Attributes:
    graphs: that Inductor was given.
    nodes: in these graphs, the bodies of higher-order ops included.
    kernels: that it generated; calls of library functions are not among them.
    code: that it generated, a text for each graph.
    """

    graphs: int = 0
    nodes: int = 0
    kernels: int = 0
    code: list[str] = field(default_factory=list)


@contextlib.contextmanager
def compilation() -> Iterator[Compilation]:
    """Record what Inductor is given and makes, whichever backend calls it."""
    from torch._inductor import compile_fx as inductor
    from torch._inductor import metrics
    from torch._inductor.graph import GraphLowering

    seen, depth, original = Compilation(), 0, inductor.compile_fx

    def recording(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:  # it calls itself with its configuration applied
            seen.graphs += 1
            seen.nodes += _nodes(model)
        depth += 1
        try:
            return original(model, *args, **kwargs)
        finally:
            depth -= 1

    before = metrics.generated_kernel_count
    with (
        mock.patch.object(inductor, "compile_fx", recording),
        mock.patch.object(GraphLowering, "save_output_code", seen.code.append),
    ):
        yield seen
    seen.kernels = metrics.generated_kernel_count - before


def graphs_captured() -> int:
    """How many graphs Dynamo has given to any backend in this process."""
    return int(counters["stats"]["unique_graphs"])


def _nodes(model: Any) -> int:
    modules = [model, *model.modules()] if isinstance(model, torch.nn.Module) else []
    graphs = {id(m.graph): m.graph for m in modules if isinstance(m, torch.fx.GraphModule)}
    return sum(len(graph.nodes) for graph in graphs.values())
