"""One case: its contestants compiled, checked, measured, and timed in turns, in one process.

A contestant is compiled with caches of its own, in which is nothing. Then it is checked against
eager, and its memory is measured. All that are right take turns: a noisy machine is noisy for all
of them. Last, evaluations are counted in another program, which is not timed.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils.benchmark import Timer

from benchmarks.cases import CASES, Case, Size
from benchmarks.check import Expected, check, expected_of, outcome_of, outcomes_of
from benchmarks.contestants import BY_HAND, CONTESTANTS, Contestant
from benchmarks.counting import COUNTS
from benchmarks.memory import peak
from benchmarks.programs import Program, Setting, program

__all__ = ["first_line", "measure"]

Row = dict[str, Any]

_SLOW, _SLOW_ROUNDS = 5.0, 5  # times as long as by hand; the rounds of those


def measure(
    case: str,
    names: list[str],
    size: dict[str, int],
    setting: dict[str, str],
    rounds: int,
    code: str | None = None,
) -> list[Row]:
    """Return a row for each contestant: its figures, or an ``error`` in one line.

    Args:
        rounds: timed steps of each; of those that take far longer than by hand, a few.
        code: a folder, to keep the generated code in.
    """
    torch.backends.cudnn.allow_tf32 = False  # convolutions as precise as matrix products
    it = _Case(CASES[case], Size(**size), Setting(**setting))
    _wake(it)
    programs, rows = {}, {}
    order = random.Random(f"{case} {size}").sample(names, len(names))
    for name in order:
        try:
            programs[name], rows[name] = it.compiled(CONTESTANTS[name], code)
        except Exception as error:
            rows[name] = {"error": first_line(error)}
    for name, timed in _in_turns(programs, rounds).items():
        if "error" in timed:
            rows[name] = timed
            del programs[name]
        else:
            rows[name] |= timed
    for name, made in programs.items():
        try:
            made.restart()
            check([outcome_of(made)], it.expected(CONTESTANTS[name].shares_effects()))
        except Exception as error:
            rows[name] = {"error": f"once it was timed: {first_line(error)}"}
            continue
        try:
            rows[name]["evaluations"] = it.counted(CONTESTANTS[name])
        except Exception as error:  # its figures stand without a count
            rows[name]["not_counted"] = first_line(error)
    where = {"case": case, "grows": it.case.grows, "value": it.case.knob(it.size)}
    another = {name: CONTESTANTS[name].is_another_program(it.case) for name in names}
    return [where | {"contestant": n, "another": another[n]} | rows[n] for n in names]


class _Case:
    """A case at a size, in a setting."""

    def __init__(self, case: Case, size: Size, setting: Setting) -> None:
        self.case, self.size, self.setting = case, size, setting
        self.expected: Callable[[bool], Expected] = cache(
            lambda sharing: expected_of(case, size, setting, sharing=sharing)
        )

    def compiled(self, contestant: Contestant, code: str | None) -> tuple[Program, Row]:
        """Return a program whose results are eager's, and its figures but for its time."""
        made = program(self.case, contestant, self.size, self.setting)
        gc.collect()
        gc.freeze()  # compilers leave a lot, through which Python's collector would go each time
        # Not deleted: what was loaded from there is read when it first runs.
        # Of ``torch.compile(options=)`` Dynamo does not know that parameters are constants.
        freezing = torch._inductor.config.patch(freezing=contestant.freezing)
        with fresh_cache(delete=False), freezing, _seen() as seen:
            start = time.perf_counter()
            first = outcome_of(made)  # on the CPU, hence finished on every device
            elapsed = time.perf_counter() - start
        check(outcomes_of(made, first), self.expected(contestant.shares_effects()))
        made.step()  # after which no value is left of other parameters
        made.model.zero_grad(set_to_none=True)
        row: Row = {"memory": peak(made.step, self.setting.device)}
        in_eager = self.case.eager_by_hand and contestant.name == BY_HAND
        if contestant.compiler is not None and not in_eager:
            again = statistics.median(_timer(made).timeit(1).mean for _ in range(3))
            row |= {"compile": max(0.0, elapsed - again), **seen}
        if code is not None and row.get("code"):
            where = f"{self.case.name}-{self.case.grows}{self.case.knob(self.size)}"
            name = f"{where}-{contestant.name}-{self.setting.dtype}.py.txt"
            Path(code, name).write_text("\n\n# ---- next graph ----\n\n".join(row["code"]))
        row.pop("code", None)
        return made, row

    def counted(self, contestant: Contestant) -> list[int] | None:
        """Return the evaluations of one step, forward and backward; None where it is frozen."""
        if contestant.freezing or contestant.source == "plain":
            return None
        counting = program(self.case, contestant, self.size, self.setting, counting=True)
        counting.step()
        COUNTS.update(forward=0, backward=0)
        counting.step()
        return [COUNTS["forward"], COUNTS["backward"]]


@contextlib.contextmanager
def _seen() -> Iterator[Row]:
    """Record what Inductor is given and makes, whichever backend calls it."""
    from torch._inductor import metrics
    from torch._inductor.graph import GraphLowering

    code: list[str] = []
    seen: Row = {"code": code}
    graphs, kernels = counters["stats"]["unique_graphs"], metrics.generated_kernel_count
    with mock.patch.object(GraphLowering, "save_output_code", code.append):
        yield seen
    seen["graphs"] = counters["stats"]["unique_graphs"] - graphs
    seen["kernels"] = metrics.generated_kernel_count - kernels


def _timer(made: Program) -> Timer:
    """Each measurement is of one step that follows two of its own."""
    names = {"step": made.step}
    return Timer("step()", globals=names, num_threads=torch.get_num_threads())


def _in_turns(programs: Mapping[str, Program], rounds: int) -> dict[str, Row]:
    """Return the seconds of each program's steps, or that it compiled again.

    The order changes from round to round: in a fixed one two programs with the same kernels
    differed by 15 %, always the same way.
    """
    timers = {name: _timer(made) for name, made in programs.items()}
    found: dict[str, Row] = {name: {"steps": []} for name in programs}
    order, turns = random.Random(0), list(programs)
    gc.freeze()
    for i in range(rounds):
        turns = [name for name in turns if "steps" in found[name]]
        if i == _SLOW_ROUNDS and BY_HAND in turns:
            limit = _SLOW * statistics.median(found[BY_HAND]["steps"])
            turns = [n for n in turns if statistics.median(found[n]["steps"]) <= limit]
        gc.collect()
        order.shuffle(turns)
        for name in turns:
            graphs = counters["stats"]["unique_graphs"]
            seconds = timers[name].timeit(1).mean
            if counters["stats"]["unique_graphs"] != graphs:
                found[name] = {"error": "recompiled while timed"}
            else:
                found[name]["steps"].append(seconds)
    gc.unfreeze()
    return found


class _Small(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x[None], torch.linalg.solve(x @ x, x)[None]).tanh()


def _wake(it: _Case) -> None:
    """Use compilers and libraries once: what first uses cost is no program's compile time.

    On another model: Dynamo would take the sizes of one it has seen with others to be dynamic.
    """
    x = torch.eye(2, device=it.setting.device, requires_grad=True)
    for backend in ("inductor", "fxparam"):
        torch.compile(_Small(), backend=backend)(x).sum().backward()
    if it.case.exported:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            exported = torch.export.export(nn.Tanh(), (x,), strict=False)
            path = str(Path(folder) / "wake.pt2")
            package = torch._inductor.aoti_compile_and_package(exported, package_path=path)
            torch._inductor.aoti_load_package(package)(x)


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says, of what a backend wraps."""
    error = getattr(error, "inner_exception", None) or error
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}"[:120] if said else type(error).__name__
