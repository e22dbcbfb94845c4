"""Measure cases: a fresh process per contestant, then one per case in which they take turns."""

from __future__ import annotations

import dataclasses
import statistics
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


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        cases, contestants: names.
        quick: the smallest size of each case; else its middle one.
        grow: all three sizes.
        rounds: timed steps of each contestant.
        probes: cold compilations of each contestant, of which the median counts.
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
        """How many processes that takes."""
        return sum(self.probes * len(self.names(case)) + 1 for case, _ in self.points())


def run(plan: Plan, tick: Callable[[str], None] = lambda what: None) -> Iterator[list[Row]]:
    """The rows of each case at each size, as they come; ``tick`` hears of each process to start."""
    for case, size in plan.points():
        names = plan.names(case)
        probes = {name: _probe(plan, case, size, name, tick) for name in names}
        working = [name for name in names if "error" not in probes[name]]
        tick(f"{case.name} ({case.grows} {case.knob(size)}): step times")
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


def _probe(plan: Plan, case: Case, size: Size, name: str, tick: Callable[[str], None]) -> Row:
    code = str(plan.code.resolve()) if plan.code else None
    job = _job(plan, "probe", case, size, [name], code=code)
    found = []
    for _ in range(plan.probes):
        tick(f"{case.name} ({case.grows} {case.knob(size)}): {name}")
        found.append(run_job(job, plan.limit))
        if "error" in found[-1]:
            return found[-1]
    for figure in ("compile", "peak"):
        values = [each[figure] for each in found if each.get(figure) is not None]
        if values:
            found[0][figure] = statistics.median(values)
    return found[0]


def _rows(case: Case, size: Size, figures: dict[str, Row]) -> list[Row]:
    """Absolute figures and their ratios to the program by hand."""
    by_hand = figures[BY_HAND]
    limits = by_hand if "error" not in by_hand else {}
    rows = []
    for name, own in figures.items():
        where = {"case": case.name, "grows": case.grows, "value": case.knob(size)}
        row: Row = {**where, "contestant": name, "error": own.get("error")}
        if row["error"] is None:
            for figure, key in (("step", "steps"), ("forward", "forwards")):
                row[figure] = spread(own[key])
                row[f"{figure}_ratio"] = ratios(own[key], limits.get(key, ()))
            for figure in ("compile", "peak"):
                row[figure], limit = own.get(figure), limits.get(figure)
                both = row[figure] is not None and limit
                row[f"{figure}_ratio"] = row[figure] / limit if both else None
            for figure in ("evaluations", "nodes", "kernels", "not_counted"):
                row[figure] = own.get(figure)
        rows.append(row)
    return rows
