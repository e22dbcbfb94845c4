"""Step times of several programs in one process, taking turns, each checked before any is timed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.check import Outcome, check, outcome_of
from benchmarks.errors import first_line
from benchmarks.measure import timed_step
from benchmarks.programs import Program

__all__ = ["interleaved"]

_WARM_UP = 2


def interleaved(
    makers: Mapping[str, Callable[[], Program]],
    expected: Callable[[str], Outcome],
    rounds: int,
    *,
    dtype: str = "float32",
) -> dict[str, dict[str, Any]]:
    """Time the programs in turns, so that a noisy machine is noisy for all of them.

    Each turn is two steps of which the second is timed: as in training, a step comes after one of
    its own. The order changes from round to round: in a fixed one two programs with the same
    kernels differed by 15 %, always the same way.

    Args:
        makers: makes each program, by the contestant's name.
        expected: what eager gives, for a contestant's name.
        rounds: timed steps of each.

    Returns:
        For each name ``{"error": line}``, or the seconds of each round: ``{"steps", "forwards"}``.
    """
    results: dict[str, dict[str, Any]] = {}
    right: dict[str, Program] = {}
    for name, make in makers.items():
        try:
            program = make()
            check(outcome_of(program), expected(name), dtype)
            for _ in range(_WARM_UP):
                timed_step(program)
        except Exception as error:
            results[name] = {"error": first_line(error)}
        else:
            right[name] = program
            results[name] = {"steps": [], "forwards": []}
    gc.collect()
    gc.disable()
    try:
        turns = list(right.items())
        order = random.Random(0)
        for _ in range(rounds):
            order.shuffle(turns)
            for name, program in turns:
                timed_step(program)
                step, forward = timed_step(program)
                results[name]["steps"].append(step)
                if forward is not None:
                    results[name]["forwards"].append(forward)
                program.reset()  # frees its gradients before the next one's turn
    finally:
        gc.enable()
    return results
