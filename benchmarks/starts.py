"""A warm start: the first step of a fresh process that finds what an earlier one has compiled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

from torch._dynamo.utils import counters

from benchmarks.cases import CASES
from benchmarks.contestants import BY_HAND, CONTESTANTS
from benchmarks.process import call
from benchmarks.programs import Setting, program

__all__ = ["first_step", "rows"]

_CASES = ("orthogonal-rnn", "albert-lora", "vocoder")


def first_step(case: str, contestant: str, began: float) -> dict[str, Any]:
    """Return the seconds of the first step, and those since the process ``began``."""
    made = program(CASES[case], CONTESTANTS[contestant], CASES[case].size, Setting())
    start = time.perf_counter()
    made.step()
    first, hits = time.perf_counter() - start, counters["aot_autograd"]["autograd_cache_hit"]
    return {"first": first, "whole": time.time() - began, "hits": hits}


def rows(limit: float) -> Iterator[dict[str, Any]]:
    """Yield the first steps of two processes that have caches in common, cold and warm."""
    for case in _CASES:
        for name in ("inductor", BY_HAND, "fxparam"):
            with tempfile.TemporaryDirectory() as folder:
                found = {
                    state: call(
                        "benchmarks.starts:first_step",
                        limit,
                        {"TORCHINDUCTOR_CACHE_DIR": folder},
                        case=case,
                        contestant=name,
                        began=time.time(),
                    )
                    for state in ("cold", "warm")
                }
            yield {"case": case, "contestant": name, **found}
