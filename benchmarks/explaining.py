"""How long an explanation takes, as a multiple of capture and passes alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fxparam
from benchmarks.process import call
from docs.tools import models

__all__ = ["measure", "rows"]

_TURNS = 5


def measure(name: str) -> dict[str, Any]:
    """Return the median seconds of both, for a model of the recorded pages."""
    model, inputs = getattr(models, name)()

    def capture() -> None:
        torch.compiler.reset()
        torch.compile(model, backend=fxparam.backend("eager"))(inputs)

    ways: dict[str, Callable[[], Any]] = {
        "capture": capture,
        "explain": lambda: fxparam.explain(model, inputs),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_TURNS + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - start)
    # The first turn warms up.
    return {way: statistics.median(seconds[1:]) for way, seconds in times.items()}


def rows(limit: float) -> Iterator[dict[str, Any]]:
    for name in ("vocoder", "transformer", "rnn"):
        yield {"model": name} | call("benchmarks.explaining:measure", limit, name=name)
