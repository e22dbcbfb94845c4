"""Compiles cases for a pretended GPU, runs them in Triton's interpreter, and writes what was seen.

``python -m tests.triton.measure OUTPUT.json CASE...`` with ``TRITON_INTERPRET=1``; without a case,
all. It prints a row for each case: kernels, launches and calls of other ops of each contestant.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

import fxparam
from fxparam.explaining.generated import count
from tests.triton.cases import CASES, SIZE, Case, error, results
from tests.triton.pretended_gpu import for_gpu

__all__ = ["CONTESTANTS", "COUNTS", "measured"]

COUNTS = ("kernels", "launches", "extern_calls")
CONTESTANTS = {
    "Inductor": lambda: "inductor",
    "shared": lambda: fxparam.backend(lower=False, batch=False),
    "fxparam": fxparam.backend,
    "by hand": lambda: "inductor",
}


def measured(case: Case, contestant: str, change: Any = lambda source: source) -> dict[str, Any]:
    """Return counts, kernels and errors of one way to compile a case."""
    torch.manual_seed(0)
    model = case.model(by_hand=contestant == "by hand")
    x = torch.randn(8, SIZE)
    eager = results(case, model, model, x)
    exact = results(case, model.double(), model, x.double())
    model.float()
    torch.compiler.reset()
    with for_gpu(change=change) as run:
        # Inductor takes a scan in a full graph only.
        compiled = torch.compile(model, backend=CONTESTANTS[contestant](), fullgraph=True)
        worst, rounds = 0.0, 0
        while rounds < run.configurations or not rounds:
            worst = max(worst, error(results(case, model, compiled, x), exact))
            run.next_configuration()
            rounds += 1
    return {
        **dataclasses.asdict(count(run.modules)),
        "fused": [dataclasses.asdict(kernel) for kernel in run.kernels],
        "configurations": rounds,
        "interpreted": run.interpreted,
        "error": worst,
        "eager_error": error(eager, exact),
        "sources": run.sources,
    }


def _wrong(source: str) -> str:
    """Return the source of a kernel that multiplies what it reads first by 1.001."""
    return source.replace("tl.load(in_ptr0", "1.001 * tl.load(in_ptr0")


def main(output: str, *names: str) -> None:
    found = {}
    print("|", *("case", *CONTESTANTS), sep=" | ")
    for name in names or CASES:
        found[name] = {each: measured(CASES[name], each) for each in CONTESTANTS}
        cells = (", ".join(str(each[key]) for key in COUNTS) for each in found[name].values())
        print("|", name, *cells, sep=" | ", flush=True)
        if name == "weight norm":  # the negative control
            found[name]["wrong"] = measured(CASES[name], "fxparam", _wrong)
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
