"""Every way to run a model whose weights are computed: checked against eager, and measured.

Each figure is shown as a multiple of the one of the source hoisted by hand. Without the name of a
section the whole record is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import plot, tables
from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS
from benchmarks.programs import Setting
from benchmarks.record import SECTIONS, Plan, environment, write

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--list", action="store_true", help="print cases and contestants, and stop")
    add("--case", action="append", choices=CASES, metavar="NAME", help="only this; repeatable")
    add("--contestant", action="append", choices=CONTESTANTS, metavar="NAME", help="the same")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    dtypes = ("float32", "bfloat16")
    add("--dtype", default="float32", choices=dtypes, help="bfloat16: under autocast to it")
    add("--quick", action="store_true", help="few cases and contestants, the smallest sizes")
    add("--rounds", type=int, default=20, help="timed steps of each contestant (20)")
    add("--limit", type=float, default=600, help="seconds for each contestant, or job")
    add("--output", type=Path, default=Path("fxparam-bench.json"), help="the record, as JSON")
    add("--resume", action="store_true", help="keep the sections and cases that --output has")
    add("--code", type=Path, metavar="FOLDER", help="keep the generated code there")
    add("--show", type=Path, metavar="RECORD", help="print its tables and draw it, and stop")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    cases = [name for name, case in CASES.items() if case.quick or not options.quick]
    contestants = [name for name, c in CONTESTANTS.items() if c.quick or not options.quick]
    return Plan(
        cases=options.case or cases,
        contestants=options.contestant or contestants,
        setting=Setting(options.device, options.dtype),
        smallest=options.quick,
        rounds=options.rounds,
        limit=options.limit,
        code=options.code,
        output=options.output,
    )


def _sections(options: argparse.Namespace) -> list[str]:
    few = options.quick or options.case or options.contestant or options.device == "cuda"
    return options.sections or (["cases"] if few else list(SECTIONS))


def _problem(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, before minutes are spent on them."""
    if unknown := set(options.sections) - SECTIONS.keys():
        return f"no section {', '.join(unknown)}: known are {', '.join(SECTIONS)}"
    if options.rounds < 1 or not 0 < options.limit < float("inf"):
        return "--rounds and --limit must be positive numbers"
    if options.output.is_dir() or not options.output.resolve().parent.is_dir():
        return f"--output {options.output}: not a file in a folder that exists"
    if options.code is not None and options.code.exists() and not options.code.is_dir():
        return f"--code {options.code}: not a folder"
    if options.device == "cuda" and not {*options.sections} <= {"cases", "growth"}:
        return "--device cuda: only cases and growth run on a GPU"
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Return a record, or None of a file that holds none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        whole = {"command", "environment", "setting", "minutes", "done"} <= found.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return found if whole else None


def main(arguments: list[str]) -> int:
    """Return the exit code: 2 for wrong arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if problem := _problem(options):
        parser.error(problem)
    if options.list:
        for each in (*CASES.values(), *CONTESTANTS.values()):
            print(f"{each.name:26} {each.about}")
        return 0
    if options.show is not None:
        shown = _read(options.show)
        if shown is None:
            parser.error(f"--show {options.show}: not a record")
        return _show(shown, options.show)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this torch sees no CUDA device")
        return 0
    plan = _plan(options)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks {shlex.join(arguments)}".strip(),
        "environment": environment(options.device),
        "setting": {**dataclasses.asdict(plan.setting), "rounds": plan.rounds},
        "minutes": 0.0,
        "done": [],
    }
    if options.resume and options.output.exists():
        found = _read(options.output)
        if found is None:
            parser.error(f"--resume {options.output}: not a record")
        old, new = (
            {**each, "date": None} for each in (found["environment"], record["environment"])
        )
        if old != new or found["setting"] != record["setting"]:
            parser.error(f"--resume {options.output}: made elsewhere, or with other settings")
        record = found
        there = {row["case"] for row in record.get("cases", ())}
        plan = dataclasses.replace(plan, cases=[n for n in plan.cases if n not in there])
    if options.code is not None:
        options.code.mkdir(parents=True, exist_ok=True)
    for section in _sections(options):
        if section not in record["done"]:
            _add(section, plan, record)
    print(f"results: {plan.output}")
    return 0


def _add(section: str, plan: Plan, record: dict[str, Any]) -> None:
    """Measure a section, and print and write what comes: a run that is cut off keeps what it has.

    Cases that the record has are kept. Of another section that is not whole nothing is.
    """
    record[section] = record.get(section, []) if section == "cases" else []
    start = time.perf_counter()
    for rows in SECTIONS[section](plan):
        record[section] += rows
        if section == "cases":  # also of cases that were added later
            record[section].sort(key=lambda row: [*CASES].index(row["case"]))
        record["minutes"] += (time.perf_counter() - start) / 60
        start = time.perf_counter()
        write(plan.output, record)
        if section in ("cases", "growth"):
            print(tables.of_rows(section, rows), flush=True)
    if section not in ("cases", "growth"):
        print(tables.of_rows(section, record[section]), flush=True)
    if section != "cases":
        record["done"].append(section)
    write(plan.output, record)


def _show(record: dict[str, Any], path: Path) -> int:
    for section in filter(record.__contains__, SECTIONS):
        print(f"\n{section}:\n\n{tables.of_rows(section, record[section])}")
    for drawn in plot.draw(record, path.with_suffix("")):
        print(f"plot: {drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
