"""Triton kernels, launches and calls of other ops, counted without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from benchmarks.process import call

__all__ = ["measure", "rows"]


def measure() -> list[dict[str, Any]]:
    """Return the counts of each case and contestant of ``tests/triton``."""
    from tests.triton.cases import CASES
    from tests.triton.measure import CONTESTANTS, COUNTS, measured

    found = []
    for name, case in CASES.items():
        ways = {each: measured(case, each) for each in CONTESTANTS}
        counts = {each: [way[count] for count in COUNTS] for each, way in ways.items()}
        found.append({"case": name, "counts": counts})
    return found


def rows(limit: float) -> Iterator[dict[str, Any]]:
    """Yield nothing where Triton is not installed."""
    if importlib.util.find_spec("triton"):
        found = call("benchmarks.kernels:measure", limit, {"TRITON_INTERPRET": "1"})
        yield from found if isinstance(found, list) else [found]
