"""Many programs, judged and counted."""

from __future__ import annotations

import gc
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.fuzz.generate import generate
from tests.fuzz.judge import Judgement, Verdict, judge
from tests.fuzz.program import Program, in_scope, ingredients
from tests.fuzz.shrink import shrink


@dataclass
class Tally:
    """What a campaign found. Programs that raise in eager are drawn again, not counted as run."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    shared: int = 0
    ingredients: Counter[str] = field(default_factory=Counter)
    ingredients_shared: Counter[str] = field(default_factory=Counter)
    mismatches: list[Program] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def run(self) -> int:
        return self.verdicts.total() - self.verdicts[Verdict.INVALID]

    def add(self, program: Program, judgement: Judgement) -> None:
        self.verdicts[judgement.verdict] += 1
        if judgement.verdict is Verdict.INVALID:
            return
        found = ingredients(program)
        self.ingredients.update(found)
        if judgement.merged:
            self.shared += 1
            self.ingredients_shared.update(found)
        if judgement.verdict is Verdict.MISMATCH:
            self.mismatches.append(program)

    def line(self) -> str:
        counts = ", ".join(f"{self.verdicts[v]} {v.value}" for v in Verdict)
        rate = self.run / max(self.seconds, 1e-9)
        share = 100 * self.shared / max(self.run, 1)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return (
            f"{self.run} programs: {counts}; "
            f"shared in {share:.0f} %; {rate:.1f} programs/s; {memory} MB"
        )

    def summary(self) -> str:
        rows = [
            f"  {name:24} {count:6} {self.ingredients_shared[name]:6}"
            for name, count in sorted(self.ingredients.items(), key=lambda item: -item[1])
        ]
        head = f"  {'ingredient':24} {'in':>6} {'shared':>6}"
        return "\n".join([self.line(), head, *rows])


def run(
    seeds: Iterable[int], *, inner: str = "", scope: str = ""
) -> Iterator[tuple[Program, Judgement, Tally]]:
    """Judge the program of each seed; the tally is the same object, growing.

    Args:
        scope: how long each shares: one of ``SCOPES``.
    """
    tally, begin = Tally(), time.monotonic()
    for count, seed in enumerate(seeds):
        program = in_scope(generate(seed), scope)
        judgement = judge(program, inner=inner)
        tally.add(program, judgement)
        tally.seconds = time.monotonic() - begin
        if count % 50 == 0:
            gc.collect()  # compiled graphs are cycles
        yield program, judgement, tally


def shrunk(program: Program, *, inner: str = "", seconds: float = 60) -> Program:
    """A small program that fails in the same manner: by raising, or by a different result."""
    raises = "raises" in judge(program, inner=inner).differences

    def fails(candidate: Program) -> bool:
        found = judge(candidate, inner=inner)
        return found.verdict is Verdict.MISMATCH and ("raises" in found.differences) == raises

    return shrink(program, fails, seconds=seconds)
