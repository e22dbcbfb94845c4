"""Measure cases: a fresh process per contestant, then one per case in which they take turns."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case, Size
from benchmarks.contestants import BY_HAND, CONTESTANTS, contestants_for
from benchmarks.process import run_job
from benchmarks.programs import Setting
from benchmarks.statistic import ratios, spread

__all__ = ["Plan", "run"]

Row = dict[str, Any]
# Hears what is measured now, and the number of its process among Plan.jobs().
Tick = Callable[[str, int], None]

# Seconds of a contestant's probes after which it gets no more: what varies from one compilation to
# another is seconds, which a long one does not hide in, and it is what makes a run long.
_ENOUGH = 60.0

# Of every probe: the median, and all of them.
_REPEATED = (("compile", "compiles"), ("peak", "peaks"), ("allocated", "all_allocated"))
# Of a probe, as they are.
_FIGURES = (
    *(all_of_them for _, all_of_them in _REPEATED),
    *("evaluations", "graphs", "nodes", "kernels", "not_counted"),
)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        cases, contestants: names.
        quick: the smallest size of each case; else its middle one.
        grow: all three sizes.
        rounds: timed steps of each contestant.
        probes: cold compilations of each contestant at most, of which the median counts.
        limit: seconds after which a process is ended, for each contestant that it runs.
        code: a folder to keep the generated code in.
        done: cases and values of their knobs that are not measured again.
    """

    cases: list[str]
    contestants: list[str]
    setting: Setting = Setting()
    quick: bool = False
    grow: bool = False
    rounds: int = 30
    probes: int = 1
    limit: float = 900.0
    code: Path | None = None
    done: frozenset[tuple[str, int]] = frozenset()

    def points(self) -> list[tuple[Case, Size]]:
        """Each case at each of its sizes, but for what is done."""
        points = [(CASES[name], size) for name in self.cases for size in self._sizes(CASES[name])]
        return [
            (case, size) for case, size in points if (case.name, case.knob(size)) not in self.done
        ]

    def _sizes(self, case: Case) -> list[Size]:
        if self.grow:
            return case.sizes()
        return [case.small() if self.quick else case.size]

    def names(self, case: Case) -> list[str]:
        """Contestants of a case; the one by hand always runs, for the ratios."""
        wanted = {*self.contestants, BY_HAND}
        return [c.name for c in contestants_for(case, [n for n in CONTESTANTS if n in wanted])]

    def jobs(self) -> int:
        """How many processes that takes at most."""
        return sum(self.probes * len(self.names(case)) + 1 for case, _ in self.points())


def run(plan: Plan, tick: Tick = lambda what, number: None) -> Iterator[list[Row]]:
    """The rows of each case at each size, as they come; ``tick`` hears of each process to start."""
    done = 0
    for case, size in plan.points():
        names = plan.names(case)
        probes = _probes(plan, case, size, tick, done)
        working = [name for name in names if "error" not in probes[name]]
        done += plan.probes * len(names) + 1
        tick(f"{case.name} ({case.grows} {case.knob(size)}): step times", done)
        job = _job(plan, "time", case, size, working, rounds=plan.rounds)
        times = run_job(job, plan.limit * max(1, len(working)))
        failed = times.get("error")
        for name in working:
            probes[name].update({"error": failed} if failed else times[name])
        yield _rows(case, size, probes)


def _job(
    plan: Plan, kind: str, case: Case, size: Size, names: list[str], **more: Any
) -> dict[str, Any]:
    return {
        "kind": kind,
        "case": case.name,
        "contestants": names,
        "size": dataclasses.asdict(size),
        "setting": dataclasses.asdict(plan.setting),
        **more,
    }


def _probes(plan: Plan, case: Case, size: Size, tick: Tick, done: int) -> dict[str, Row]:
    """Figures of each contestant, in rounds whose order changes: a machine drifts.

    The first process of a contestant does everything; those after it only compile and run, hence
    there are none of one that does not compile.
    """
    names, order = plan.names(case), random.Random(0)
    found: dict[str, list[Row]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    for turn in range(plan.probes):
        for place, name in enumerate(order.sample(names, len(names)), 1):
            compiles = CONTESTANTS[name].compiler is not None
            enough = spent[name] >= _ENOUGH or (turn and not compiles)
            if enough or any("error" in each for each in found[name]):
                continue
            number = done + turn * len(names) + place
            tick(f"{case.name} ({case.grows} {case.knob(size)}): {name}", number)
            code = str(plan.code.resolve()) if plan.code and turn == 0 else None
            job = _job(plan, "probe", case, size, [name], code=code, whole=turn == 0)
            start = time.perf_counter()
            found[name].append(run_job(job, plan.limit))
            spent[name] += time.perf_counter() - start
    return {name: _together(each) for name, each in found.items()}


def _together(found: list[Row]) -> Row:
    """The first probe's figures, with all values and the median of those that each has."""
    for each in found:
        if "error" in each:
            return each
    whole = found[0]
    for figure, all_of_them in _REPEATED:
        values = [each[figure] for each in found if each.get(figure) is not None]
        if values:
            whole[figure], whole[all_of_them] = statistics.median(values), values
    return whole


def _rows(case: Case, size: Size, figures: dict[str, Row]) -> list[Row]:
    """Absolute figures and their ratios to the program by hand."""
    by_hand = figures[BY_HAND]
    limits = by_hand if "error" not in by_hand else {}
    rows = []
    for name, own in figures.items():
        where = {"case": case.name, "grows": case.grows, "value": case.knob(size)}
        another = CONTESTANTS[name].computes_another_program(case)
        row: Row = {**where, "contestant": name, "another": another, "error": own.get("error")}
        if row["error"] is None:
            for figure, key in (("step", "steps"), ("forward", "forwards")):
                row[figure] = spread(own[key])
                row[key] = own[key]
                row[f"{figure}_ratio"] = ratios(own[key], limits.get(key, ()))
            for figure in ("compile", "peak", "allocated"):
                row[figure], limit = own.get(figure), limits.get(figure)
                both = row[figure] is not None and limit
                row[f"{figure}_ratio"] = row[figure] / limit if both else None
            for figure in _FIGURES:
                row[figure] = own.get(figure)
        rows.append(row)
    return rows
