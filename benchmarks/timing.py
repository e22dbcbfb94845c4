"""Step times of several programs in one process, taking turns, each checked before any is timed."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.check import Expected, check, outcome_of, outcomes_of
from benchmarks.errors import first_line
from benchmarks.measure import graphs_captured, timed_step
from benchmarks.programs import Program

__all__ = ["interleaved"]

_WARM_UP = 2


def interleaved(
    makers: Mapping[str, Callable[[], Program]],
    expected: Callable[[str], Expected],
    rounds: int,
    settle: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Time the programs in turns, so that a noisy machine is noisy for all of them.

    Each turn is two steps at least of which the last is timed: as in training, a step comes after
    one of its own. The order changes from round to round: in a fixed one two programs with the same
    kernels differed by 15 %, always the same way.

    Args:
        makers: makes each program, by the contestant's name.
        expected: what eager gives, for a contestant's name.
        rounds: timed steps of each.
        settle: seconds of untimed steps in each turn.

    Returns:
        For each name ``{"error": line}``, or the seconds of each round: ``{"steps", "forwards"}``.
        A program that compiles again while it is timed has an error, and one that is wrong after.
    """
    results: dict[str, dict[str, Any]] = {}
    right: dict[str, Program] = {}
    start: dict[str, dict[str, Tensor]] = {}
    for name, make in makers.items():
        try:
            program = make()
            start[name] = {n: t.clone() for n, t in program.model.named_buffers()}
            check(outcomes_of(program), expected(name))
            for _ in range(_WARM_UP):
                timed_step(program)
        except Exception as error:
            results[name] = {"error": first_line(error)}
        else:
            right[name] = program
            results[name] = {"steps": [], "forwards": []}
    for name in _in_turns(right, results, rounds, settle):
        results[name] = {"error": "recompiled while timed"}
        del right[name]
    for name, program in right.items():
        try:
            _restore(program, start[name])
            check([outcome_of(program)], expected(name))
        except Exception as error:
            results[name] = {"error": f"once it was timed: {first_line(error)}"}
    return results


def _restore(program: Program, buffers: dict[str, Tensor]) -> None:
    """The buffers that a first step finds: what was timed is to do the same step once more."""
    with torch.no_grad():
        for name, t in program.model.named_buffers():
            t.copy_(buffers[name])


def _in_turns(
    programs: Mapping[str, Program],
    results: dict[str, dict[str, Any]],
    rounds: int,
    settle: float,
) -> set[str]:
    """Add what is measured to the results; returns the names of those that compiled again."""
    turns, order, recompiled = list(programs.items()), random.Random(0), set()
    with _collected_between_rounds() as collect:
        for _ in range(rounds):
            collect()
            order.shuffle(turns)
            for name, program in turns:
                graphs = graphs_captured()
                _settle(program, settle)
                step, forward = timed_step(program)
                results[name]["steps"].append(step)
                if forward is not None:
                    results[name]["forwards"].append(forward)
                program.reset()  # frees its gradients before the next one's turn
                if graphs_captured() != graphs:
                    recompiled.add(name)
    return recompiled


def _settle(program: Program, seconds: float) -> None:
    """Untimed steps: at least one, until the seconds have passed."""
    end = time.perf_counter() + seconds
    while True:
        timed_step(program)
        if time.perf_counter() >= end:
            return


@contextlib.contextmanager
def _collected_between_rounds() -> Iterator[Callable[[], object]]:
    """Python's collector runs when called, and passes over what is there now: compilers leave a
    lot, through which it would go each time."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()
