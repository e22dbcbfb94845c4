"""The cases, by name, in the order in which they are shown."""

from benchmarks.cases import (
    accumulation,
    albert,
    breaks,
    critic,
    flows,
    implicit,
    inference,
    lipschitz,
    loops,
    recurrent,
    stacks,
    wavenet,
)
from benchmarks.cases.case import Case, Size

__all__ = ["CASES", "Case", "Size"]

_FILES = (
    recurrent,
    loops,
    critic,
    wavenet,
    flows,
    stacks,
    albert,
    implicit,
    lipschitz,
    breaks,
    accumulation,
    inference,
)
CASES: dict[str, Case] = {case.name: case for file in _FILES for case in file.CASES}
