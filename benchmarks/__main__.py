"""The benchmark suite: every way to run a model whose weights are computed, checked and measured.

Each figure is shown as a multiple of the one of the source hoisted by hand, with the absolute
beside it. Results are checked against eager before anything is timed; a contestant that fails
shows its error instead of numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants as ways
from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS
from benchmarks.environment import environment, in_a_line
from benchmarks.files import write_json
from benchmarks.plot import draw
from benchmarks.programs import Setting
from benchmarks.runner import Plan, run
from benchmarks.table import print_line, print_rows, print_summary

__all__ = ["main"]


# What every row of a recorded run has, and every one without an error.
_ROW = {"case", "grows", "value", "contestant", "error"}
_FIGURES = {
    f"{figure}{suffix}"
    for figure in ("step", "forward", "compile", "peak")
    for suffix in ("", "_ratio")
} | {"evaluations", "nodes", "kernels"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="print cases and contestants, and stop")
    add("--case", action="append", metavar="NAME", help="only this one; may be repeated")
    add("--contestant", action="append", metavar="NAME", help="only this one; may be repeated")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", help="float32, or bfloat16 for autocast to it")
    add("--quick", action="store_true", help="few cases and contestants, the smallest sizes")
    add("--grow", action="store_true", help="each case at three sizes")
    add("--rounds", type=int, help="timed steps of each contestant (30; 10 with --quick)")
    add("--probes", type=int, help="cold compilations of each at most (3; 1 with --quick)")
    limit = "seconds a process has for each contestant it runs"
    add("--limit", type=float, default=900, help=limit)
    add("--output", type=Path, default=Path("fxparam-bench.json"), help="JSON; plots beside it")
    add("--resume", action="store_true", help="go on with the run of which --output has a part")
    add("--code", type=Path, metavar="FOLDER", help="keep the generated code there")
    add("--show", type=Path, metavar="JSON", help="print and draw a recorded run, and stop")
    return parser


def _problem(options: argparse.Namespace) -> str | None:
    """One line on what is wrong with the arguments, before minutes are spent on them."""
    for option, given, known in (
        ("--case", options.case or [], CASES),
        ("--contestant", options.contestant or [], CONTESTANTS),
        ("--device", [options.device], ("cpu", "cuda")),
        ("--dtype", [options.dtype], ("float32", "bfloat16")),
    ):
        for name in given:
            if name not in known:
                return f"{option} {name!r}: known are {', '.join(known)}"
    for name in options.contestant or []:
        reason = ways.unavailable(CONTESTANTS[name])
        if reason is not None:
            return f"--contestant {name}: {reason}"
        if not any(CONTESTANTS[name].applies_to(CASES[case]) for case in _cases(options)):
            return f"--contestant {name}: applies to none of the cases {', '.join(_cases(options))}"
    for name, value in (("rounds", options.rounds), ("probes", options.probes)):
        if value is not None and value < 1:
            return f"--{name} {value}: at least 1"
    if not 0 < options.limit < math.inf:  # also for NaN
        return f"--limit {options.limit}: a number of seconds, more than 0"
    for option, path in (("--output", options.output), ("--show", options.show)):
        if path is not None and path.suffix in (".png", ".svg"):
            return f"{option} {path}: plots are written beside it with this ending"
    if options.code is not None and options.code.exists() and not options.code.is_dir():
        return f"--code {options.code}: not a folder"
    if options.output.is_dir() or not options.output.resolve().parent.is_dir():
        return f"--output {options.output}: not a file in a folder that exists"
    if options.show is not None and not options.show.is_file():
        return f"--show {options.show}: no such file"
    return None


def _print_list() -> None:
    print("cases:")
    for case in CASES.values():
        print(f"  {case.name:26} {case.about}{' (quick)' if case.quick else ''}")
    print("contestants:")
    for each in CONTESTANTS.values():
        reason = ways.unavailable(each)
        note = f" ({reason})" if reason else " (quick)" if each.name in ways.QUICK else ""
        print(f"  {each.name:26} {each.about}{note}")


def _cases(options: argparse.Namespace) -> list[str]:
    everything = [name for name, case in CASES.items() if case.quick or not options.quick]
    return list(dict.fromkeys(options.case or everything))


def _plan(options: argparse.Namespace, done: Iterable[tuple[str, int]] = ()) -> Plan:
    return Plan(
        cases=_cases(options),
        contestants=options.contestant or list(ways.QUICK if options.quick else CONTESTANTS),
        setting=Setting(options.device, options.dtype),
        quick=options.quick,
        grow=options.grow,
        rounds=options.rounds or (10 if options.quick else 30),
        probes=options.probes or (1 if options.quick else 3),
        limit=options.limit,
        code=options.code,
        done=frozenset(done),
    )


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(width=max(160, Console().width))


@contextlib.contextmanager
def _progress(console: Any, total: int) -> Iterator[Callable[[str, int], None]]:
    """What is measured now, and how much is left: a bar, or lines without rich or a terminal.

    What turns out not to be needed counts as done: the numbers jump, and the total stays.
    """
    if console is None or not console.is_terminal:

        def line(what: str, number: int) -> None:
            print(f"[{number}/{total}] {what}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*shown, console=console) as progress:
        task = progress.add_task("starting", total=total)

        def advance(what: str, number: int) -> None:
            progress.update(task, completed=number - 1, description=what)

        yield advance


def _finish(results: dict[str, Any], stem: Path, console: Any) -> None:
    print_summary(results["rows"], console)
    where = in_a_line(results["environment"])
    print_line(where, console)
    for path in draw(results["rows"], where, stem):
        print_line(f"plot: {path}", console)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    problem = _problem(options)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    console = _console()
    if options.list:
        _print_list()
        return 0
    if options.show is not None:
        recorded = _recorded(options.show)
        if recorded is None:
            print(f"--show {options.show}: not a recorded run", file=sys.stderr)
            return 2
        try:
            for point in _points(recorded["rows"]):
                print_rows(point, console)
            _finish(recorded, options.show.with_suffix(""), console)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"--show {options.show}: not a recorded run: {error}", file=sys.stderr)
            return 2
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this torch sees no CUDA device")
        return 0
    asked = shlex.join(a for a in arguments if a != "--resume")
    results: dict[str, Any] = {
        "command": f"python -m benchmarks {asked}".rstrip(),
        "environment": environment(options.device),
        "dtype": options.dtype,
        "rows": [],
    }
    if options.resume and options.output.exists():
        recorded = _recorded(options.output)
        problem = _is_another_run(recorded, results)
        if recorded is None or problem is not None:
            print(f"--resume {options.output}: {problem}", file=sys.stderr)
            return 2
        results = recorded
    plan = _plan(options, ((row["case"], row["value"]) for row in results["rows"]))
    with _progress(console, plan.jobs()) as tick:
        for rows in run(plan, tick):
            results["rows"] += rows
            print_rows(rows, console)
            # After each case: a long run that is cut off keeps what it has.
            write_json(options.output, results, indent=1)
    _finish(results, options.output.with_suffix(""), console)
    print_line(f"results: {options.output}", console)
    return 0


def _recorded(path: Path) -> dict[str, Any] | None:
    """A recorded run, or None of a file that holds none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        in_a_line(found["environment"])
        whole = all(
            row.keys() >= (_ROW if row["error"] else _ROW | _FIGURES) for row in found["rows"]
        )
        whole = whole and {row["contestant"] for row in found["rows"]} <= CONTESTANTS.keys()
        whole = whole and "command" in found and len(found["rows"]) > 0
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if whole else None


def _is_another_run(recorded: dict[str, Any] | None, results: dict[str, Any]) -> str | None:
    """Why figures of a recorded run may not stand beside those to come, if they may not."""
    if recorded is None:
        return "not a recorded run"
    if recorded["command"] != results["command"]:
        return f"the command there is {recorded['command']}"
    there, here = recorded["environment"], results["environment"]
    # The system names the kernel's release, in which machines that are alike differ.
    changed = [k for k in here if k not in ("date", "system") and there.get(k) != here[k]]
    return f"made with another {', '.join(changed)}" if changed else None


def _points(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        points.setdefault((row["case"], row["value"]), []).append(row)
    return list(points.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
