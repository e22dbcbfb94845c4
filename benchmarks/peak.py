"""What a step has allocated when it has allocated most: where a figure of the memory comes from.

python -m benchmarks.peak --case NAME --contestant NAME [--contestant NAME ...] [--value N]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import sys
import warnings

from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS
from benchmarks.memory import at_peak
from benchmarks.programs import Setting, program
from benchmarks.table import print_table

__all__ = ["main"]

_MOST = 5


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak", description=__doc__)
    parser.add_argument("--case", choices=CASES, required=True)
    measurable = [name for name, each in CONTESTANTS.items() if each.compiler != "jax"]
    parser.add_argument("--contestant", choices=measurable, action="append", required=True)
    parser.add_argument("--value", type=int, help="steps or layers; else the case's own")
    options = parser.parse_args(arguments)
    case, rows = CASES[options.case], []
    value = case.knob(case.size) if options.value is None else options.value
    if value < 1:
        print(f"--value {value}: at least 1", file=sys.stderr)
        return 2
    size = dataclasses.replace(case.size, **{case.grows: value})
    for name in options.contestant:
        if not CONTESTANTS[name].applies_to(case):
            print(f"--contestant {name}: does not apply to {case.name}", file=sys.stderr)
            return 2
        made = program(case, CONTESTANTS[name], size, Setting())
        made.step()
        blocks, inside = at_peak(made)
        sizes = collections.Counter(blocks)
        most = sorted(sizes, key=lambda size: -size * sizes[size])[:_MOST]
        shown = ", ".join(f"{sizes[size]} of {size / 1e6:.4g}" for size in most)
        rows.append([name, f"{sum(blocks) / 1e6:.2f}", shown, _operations(inside)])
    print_table(
        f"{case.name}, {case.grows} {value}: at the peak",
        ("contestant", "MB", "blocks", "in"),
        rows,
        None,
    )
    return 0


def _operations(names: list[str]) -> str:
    """Outermost first, without the autograd engine's and the compiler's own names for them."""
    return " > ".join(name for name in names if name.startswith("aten::") or "Backward" in name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main(sys.argv[1:]))
