"""A record: its sections, each a list of rows, and where it was made."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fxparam
from benchmarks import demo, distributed, explaining, jax_rnn, kernels, maps, passes, starts
from benchmarks.cases import CASES, Case, Size
from benchmarks.contestants import CONTESTANTS, contestants_for
from benchmarks.process import call
from benchmarks.programs import Setting

__all__ = ["SECTIONS", "Plan", "environment", "write"]

Row = dict[str, Any]

# Disabled, so that a compilation is cold, whatever earlier ones in the process have left.
_COLD = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
_GROW = ("orthogonal-rnn", "orthogonal-rnn-scan", "orthogonal-flow")
_COMPARED = ("inductor", "fxparam")


@dataclass(frozen=True)
class Plan:
    """Attributes:
    cases, contestants: names.
    smallest: whether cases have the smallest size of their growth, not their own.
    rounds: timed steps of each contestant.
    limit: seconds after which a process is ended, for each contestant that it runs.
    code: a folder to keep the generated code in.
    output: the record; pictures are beside it.
    """

    cases: list[str] = field(default_factory=lambda: list(CASES))
    contestants: list[str] = field(default_factory=lambda: list(CONTESTANTS))
    setting: Setting = Setting()
    smallest: bool = False
    rounds: int = 20
    limit: float = 600.0
    code: Path | None = None
    output: Path = Path("fxparam-bench.json")


def _measured(plan: Plan, case: Case, size: Size, contestants: list[str]) -> list[Row]:
    names = [each.name for each in contestants_for(case, contestants)]
    found = call(
        "benchmarks.measure:measure",
        plan.limit * len(names),
        _COLD,
        case=case.name,
        names=names,
        size=dataclasses.asdict(size),
        setting=dataclasses.asdict(plan.setting),
        rounds=plan.rounds,
        code=str(plan.code.resolve()) if plan.code else None,
    )
    if isinstance(found, list):
        return found
    where = {"case": case.name, "grows": case.grows, "value": case.knob(size)}
    return [where | {"contestant": name} | found for name in names]


def _cases(plan: Plan) -> Iterator[list[Row]]:
    for case in map(CASES.__getitem__, plan.cases):
        size = case.sizes()[0] if plan.smallest else case.size
        yield _measured(plan, case, size, plan.contestants)


def _growth(plan: Plan) -> Iterator[list[Row]]:
    for case in (CASES[name] for name in _GROW if name in plan.cases):
        for size in case.sizes():
            yield _measured(plan, case, size, list(_COMPARED))


def _one_by_one(rows: Callable[[float], Iterator[Row]]) -> Callable[[Plan], Iterator[list[Row]]]:
    return lambda plan: ([row] for row in rows(plan.limit))


#: What a record has; each yields rows as they come.
SECTIONS: dict[str, Callable[[Plan], Iterator[list[Row]]]] = {
    "cases": _cases,
    "growth": _growth,
    "starts": _one_by_one(starts.rows),
    "passes": _one_by_one(passes.rows),
    "jax": _one_by_one(jax_rnn.rows),
    "maps": _one_by_one(maps.rows),
    "explaining": _one_by_one(explaining.rows),
    "distributed": _one_by_one(distributed.rows),
    "kernels": _one_by_one(kernels.rows),
    "demo": lambda plan: ([row] for row in demo.rows(plan.limit, plan.output)),
}


def environment(device: str) -> Row:
    """Return where and of what a record is made."""
    found: Row = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "fxparam": fxparam.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def write(path: Path, record: Row) -> None:
    """Write beside the file and move it there: one that is cut off leaves the old one as it was.

    A row is a line.
    """
    parts = [f'"{key}": {json.dumps(record[key])}' for key in record if key not in SECTIONS]
    for section in filter(record.__contains__, SECTIONS):
        rows = ",\n".join(json.dumps(row) for row in record[section])
        parts.append(f'"{section}": [\n{rows}\n]')
    beside = path.with_name(f"{path.name}.part")
    beside.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    beside.replace(path)
