"""What runs in a fresh process: ``python -m benchmarks.worker JOB.json RESULT.json``.

A ``probe`` measures one contestant: its cold compile, its memory, what its compilation made, and,
where that is asked for, whether its results are right and, in an untimed second program, its
evaluations. A ``time`` job measures step times of all of them.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case, Size
from benchmarks.check import Expected, check, expected_of, later_outcomes_of, outcome_of
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.counting import COUNTS
from benchmarks.errors import first_line
from benchmarks.files import write_json
from benchmarks.measure import compilation, timed_step
from benchmarks.memory import allocated, free_at_once, resident
from benchmarks.programs import Setting, program
from benchmarks.timing import interleaved
from benchmarks.wake import wake

__all__ = ["count", "main", "probe", "time_all"]

# Seconds. JAX has threads of its own: after its turn torch's may share a core, for up to 0.1 s (two
# cores, Linux), in which steps take twice and three times as long.
_SETTLE = 0.2


def probe(
    case: Case,
    contestant: Contestant,
    size: Size,
    setting: Setting,
    code: Path | None = None,
    *,
    checked: bool = True,
) -> dict[str, Any]:
    """Everything about one contestant but its step time and its evaluations.

    Args:
        code: a folder, to keep the generated code in.
        checked: whether to compare its results with eager's.

    Raises:
        Exception: whatever the contestant raises; ``check.Wrong`` if its results are not eager's.
    """
    result: dict[str, Any] = {}
    free_at_once()
    wake(case, contestant, setting)
    made = program(case, contestant, size, setting)
    with compilation() as seen:
        start = time.perf_counter()
        actual = [outcome_of(made)]  # on the CPU, hence finished on every device
        first = time.perf_counter() - start
    if checked:
        actual += later_outcomes_of(made)
    if contestant.compiler is not None:
        again = statistics.median(timed_step(made)[0] for _ in range(3))
        result["compile"] = max(0.0, first - again)
    if contestant.compiler in ("inductor", "fxparam"):
        result |= {"graphs": seen.graphs, "nodes": seen.nodes, "kernels": seen.kernels}
    # JAX has an allocator of its own, and what a GPU's takes is not resident.
    result["peak"] = None if setting.device == "cuda" else resident(made)
    result["allocated"] = None if contestant.compiler == "jax" else allocated(made)
    if code is not None and seen.code:
        code.mkdir(parents=True, exist_ok=True)
        text = "\n\n# ---- next graph ----\n\n".join(seen.code)
        where = f"{case.name}-{case.grows}{case.knob(size)}"
        name = f"{where}-{contestant.name}-{setting.device}-{setting.dtype}.py.txt"
        (code / name).write_text(text)
    if checked:  # last, for eager's memory is not the contestant's
        check(actual, expected_of(case, size, setting, sharing=contestant.shares_on_request))
    return result


def count(case: Case, contestant: Contestant, size: Size, setting: Setting) -> list[int] | None:
    """Evaluations in one step, forward and backward; None for JAX, whose are not counted."""
    if contestant.compiler == "jax":
        return None
    torch.compiler.reset()
    counting = program(case, contestant, size, setting, counting=True)
    counting.reset()
    counting.step()
    counting.reset()
    COUNTS.update(forward=0, backward=0)
    counting.step()
    return [COUNTS["forward"], COUNTS["backward"]]


def time_all(
    case: Case, contestants: list[Contestant], size: Size, setting: Setting, rounds: int
) -> dict[str, dict[str, Any]]:
    """Step times, interleaved, of those whose results are eager's."""
    named = {each.name: each for each in contestants}
    # Two at most, whatever the number of contestants.
    references: dict[bool, Expected] = {}

    def expected(name: str) -> Expected:
        sharing = named[name].shares_on_request
        if sharing not in references:
            references[sharing] = expected_of(case, size, setting, sharing=sharing)
        return references[sharing]

    makers = {name: partial(program, case, each, size, setting) for name, each in named.items()}
    two_pools = any(each.compiler == "jax" for each in contestants)
    return interleaved(makers, expected, rounds, settle=_SETTLE if two_pools else 0.0)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    case, size, setting = CASES[job["case"]], Size(**job["size"]), Setting(**job["setting"])
    contestants = [CONTESTANTS[name] for name in job["contestants"]]
    if job["kind"] == "time":
        return time_all(case, contestants, size, setting, job["rounds"])
    (contestant,) = contestants
    code = Path(job["code"]) if job.get("code") else None
    try:
        result = probe(case, contestant, size, setting, code, checked=job["whole"])
    except Exception as error:
        return {"error": first_line(error)}
    if not job["whole"]:
        return result
    try:
        result["evaluations"] = count(case, contestant, size, setting)
    except Exception as error:
        # The counting op is not part of the program: its figures stand without it.
        result["not_counted"] = first_line(error)
    return result


def main(arguments: list[str]) -> int:
    job, target = Path(arguments[0]), Path(arguments[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Convolutions as precise as matrix products are by default.
    torch.backends.cudnn.allow_tf32 = False
    write_json(target, _run(json.loads(job.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
