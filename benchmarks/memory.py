"""The memory meters: what torch's allocator gives out, and what the process has resident."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.programs import Program

__all__ = ["allocated", "at_peak", "free_at_once", "resident"]

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_at_once() -> None:
    """Let glibc give each block of 8 KiB and more back when it is freed; to call at the start.

    Else what is resident depends even more on the holes that a compilation left in the heap: the
    peak of one program, a few MB, differed by 25 % from process to process, and by 2 % with this.
    It makes compiling 6 to 8 % slower, whatever is compiled.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 8192)


def allocated(program: Program, steps: int = 2) -> int:
    """Bytes that torch's allocator has given out at most during a step, above those before it.

    Exact and the same each time. On the CPU it is read off the events of torch's profiler. What
    libraries take for themselves is not in it, nor is what JAX does.
    """
    _prepare(program)
    if program.setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(program, steps)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    changes, _ = _profiled(program, steps)
    totals = itertools.accumulate(event["args"]["Bytes"] for event in changes)
    return max(totals, default=0)


def at_peak(program: Program, steps: int = 2) -> tuple[list[int], list[str]]:
    """Why ``allocated`` is what it is, on the CPU.

    Returns:
        The bytes of each block that torch's allocator has given out when it has given out most,
        largest first, and the names of the profiler's events around that moment, outermost first.
    """
    _prepare(program)
    changes, spans = _profiled(program, steps)
    alive: dict[int, int] = {}
    total, most, blocks, when = 0, 0, list[int](), 0.0
    for event in changes:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        total += size
        if size > 0:
            alive[address] = size
        else:
            alive.pop(address, None)
        if total > most:
            most, blocks, when = total, sorted(alive.values(), reverse=True), event["ts"]
    around = [e for e in spans if e["ts"] <= when <= e["ts"] + e["dur"]]
    return blocks, [e["name"] for e in sorted(around, key=lambda e: (e["ts"], -e["dur"]))]


def _profiled(program: Program, steps: int) -> tuple[list[Any], list[Any]]:
    """What torch's profiler saw: changes of memory in their order, and events that last.

    A negative change is memory given back; what was taken before the profile is not counted then.
    """
    # Without ``acc_events`` torch 2.11 warns of cycles, of which there is one.
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        _steps(program, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    spans = [e for e in events if e.get("ph") == "X"]
    return sorted(changes, key=lambda event: event["ts"]), spans


def resident(program: Program, steps: int = 2, repeats: int = 5) -> float | None:
    """Bytes by which a step raises the process's resident memory, the median of the repeats.

    The high-water mark above what is resident before the step, as torch itself and the traces of a
    compilation are. It counts whatever allocates. Of a few MB much is chance all the same: which
    holes of the heap the step's blocks are put into depends on all that the process did before.
    One generated code was measured with 1.1 MB and with 1.4 MB, in processes whose models were
    written differently; the allocator gave out the same. The kernel counts pages in batches.
    None where the system does not tell.
    """
    peaks = [_resident_peak(program, steps) for _ in range(repeats)]
    told = [peak for peak in peaks if peak is not None]
    return statistics.median(told) if told else None


def _prepare(program: Program) -> None:
    program.reset()
    gc.collect()


def _resident_peak(program: Program, steps: int) -> int | None:
    _prepare(program)
    if not _forget_high_water():
        return None
    before = _status("VmRSS")
    _steps(program, steps)
    return _status("VmHWM") - before


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


def _status(field_name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"{_STATUS} has no {field_name}")
