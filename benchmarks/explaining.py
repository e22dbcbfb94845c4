"""How long an explanation takes, as a multiple of capture and passes alone.

``python -m benchmarks.explaining``: the models of the recorded pages, medians of turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fxparam
from docs.tools import models

_TURNS = 7


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    for name in ("vocoder", "transformer", "rnn"):
        model, inputs = getattr(models, name)()

        def capture(model: Any = model, inputs: Any = inputs) -> None:
            torch.compiler.reset()
            torch.compile(model, backend=fxparam.backend("eager"))(inputs)

        def explain(model: Any = model, inputs: Any = inputs) -> None:
            fxparam.explain(model, inputs)

        times: dict[str, list[float]] = {"capture": [], "explain": []}
        for turn in range(_TURNS + 1):  # the first warms up
            for key, function in (("capture", capture), ("explain", explain)):
                seconds = _seconds(function)
                if turn:
                    times[key].append(seconds)
        captured, explained = (statistics.median(each) for each in times.values())
        print(
            f"{name:12} {captured:.2f} s, explained {explained:.2f} s: {explained / captured:.2f}"
        )


if __name__ == "__main__":
    main()
