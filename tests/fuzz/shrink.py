"""A failing program made small: what can be left out, while it still fails, is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.program import Block, Holder, Program, Statement, render


def shrink(program: Program, fails: Callable[[Program], bool], *, seconds: float = 90) -> Program:
    """The smallest program found that fails, in the time given."""
    end = time.monotonic() + seconds
    tried = {render(program)}
    progress = True
    while progress:
        progress = False
        for candidate in _smaller(program):
            if time.monotonic() > end:
                return program
            source = render(candidate)
            if source not in tried:
                tried.add(source)
                if fails(candidate):
                    program, progress = candidate, True
                    break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for statements in _without_one(program.statements):
        yield replace(program, statements=statements)
    for k, holder in enumerate(program.holders):
        for simpler in _simpler(holder):
            holders = (*program.holders[:k], *simpler, *program.holders[k + 1 :])
            yield replace(program, holders=holders)
    yield replace(program, caller_writes=False)
    yield replace(program, training=False)
    yield replace(program, grad=False)
    yield replace(program, dtype="float64")
    yield replace(program, inner="eager")
    yield replace(program, size=2)


def _without_one(statements: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    """Each statement left out; each block opened; the same inside of blocks."""
    for k, statement in enumerate(statements):
        before, after = statements[:k], statements[k + 1 :]
        yield (*before, *after)
        if isinstance(statement, Block):
            yield (*before, *statement.body, *after)
            for body in _without_one(statement.body):
                yield (*before, replace(statement, body=body), *after)


def _simpler(holder: Holder) -> Iterator[tuple[Holder, ...]]:
    yield ()
    for k in range(len(holder.chain)):
        yield (replace(holder, chain=(*holder.chain[:k], *holder.chain[k + 1 :])),)
    yield (replace(holder, tied_to=""),)
    yield (replace(holder, api="torch" if holder.api == "fxparam" else holder.api),)
    yield (replace(holder, stored="parameter"),)
