"""From a seed to a program: its modes, and what it is made of."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tests.fuzz.grammar import Writer, detached_in_a_branch, gradient_in_the_graph
from tests.fuzz.holders import barred_links, some_holders
from tests.fuzz.program import Holder, Link, Program
from tests.fuzz.themes import theme_of, themed

# Its derivative at zero is infinite.
_STEEP = (Link("Root", 0),)


def generate(seed: int) -> Program:
    """The program of a seed: a general one, or one about a theme."""
    theme = theme_of(seed)
    return themed(seed, theme) if theme else _general(seed)


def _general(seed: int) -> Program:
    rng = Random(seed)
    dtype = rng.choices(["float64", "float32", "bfloat16", "complex64"], [70, 15, 6, 9])[0]
    grad = rng.random() < 0.8
    holders = some_holders(rng, barred_links(dtype), singular=0.05 if grad else 0.5)
    inner = rng.choices(["eager", "aot_eager"], [45, 55])[0]
    writer = Writer(rng, holders, dtype=dtype, grad=grad, inner=inner)
    statements = writer.program()
    program = Program(
        seed=seed,
        size=rng.choice([2, 3, 3, 4]),
        dtype=dtype,
        inner=inner,
        training=rng.random() < 0.75,
        grad=grad,
        caller_writes=rng.random() < 0.35,
        holders=holders,
        statements=statements,
    )
    return _with_extras(program, Random(f"extras of {seed}"))


def _with_extras(program: Program, rng: Random) -> Program:
    """Now and then a program about gradients; drawn apart, so that seeds keep their programs."""
    if not program.grad or program.dtype != "float64" or rng.random() > 0.08:
        return program
    holders, statements = program.holders, list(program.statements)
    readable = [h for h in holders if h.name != "singular" and h.stored == "parameter"]
    if readable and rng.random() < 0.5:
        extra = gradient_in_the_graph(rng, rng.choice(readable))
    elif program.inner == "aot_eager":
        steep = Holder("steep", api=rng.choice(["torch", "fxparam"]), chain=_STEEP, seed=-1)
        holders += (steep,)
        extra = detached_in_a_branch(rng, steep)
    else:
        return program
    statements.insert(rng.randrange(len(statements) + 1), extra)
    return replace(program, holders=holders, statements=tuple(statements))
