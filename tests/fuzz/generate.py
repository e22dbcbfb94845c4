"""From a seed to a program: its modules and modes; ``grammar`` writes its statements."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tests.fuzz.grammar import Writer, detached_in_a_branch, gradient_in_the_graph
from tests.fuzz.program import Holder, Link, Program

_PURE = (
    *("Symmetric", "Skew", "Exponential", "Mask", "LowRank", "Scaled", "Softplus"),
    *("Identity", "Transposed", "WorksInPlace", "Quantised", "Bounded"),
)
_IMPURE = ("DropoutMask", "Counter", "Iterated", "spectral_norm", "Normalized")
_FIRST = ("orthogonal", "cayley", "weight_norm", "Product")
# What a dtype has no kernels for, or too few digits.
_REAL = {"Softplus", "Normalized", "DropoutMask", *_FIRST, "spectral_norm"} - {"Product"}
_WIDE = {"Exponential", "orthogonal", "cayley", "spectral_norm"}
# Its derivative at zero is infinite.
_STEEP = (Link("Root", 0),)


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = Random(seed)
    dtype = rng.choices(["float64", "float32", "bfloat16", "complex64"], [70, 15, 6, 9])[0]
    barred = {"complex64": _REAL, "bfloat16": _WIDE | {"Normalized"}}.get(dtype, set())
    grad = rng.random() < 0.8
    holders = _holders(rng, barred, singular=0.05 if grad else 0.5)
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


def _holders(rng: Random, barred: set[str], *, singular: float) -> tuple[Holder, ...]:
    holders = [_holder(rng, "a", barred)]
    for name in "bc"[: rng.choices([0, 1, 2], [35, 45, 20])[0]]:
        draw = rng.random()
        other = rng.choice(holders)
        new = _holder(rng, name, barred)
        if draw < 0.12:
            new = Holder(
                name, other.stored, other.api, other.chain, same_as=other.same_as or other.name
            )
        elif draw < 0.32:
            new = Holder(name, other.stored, other.api, other.chain, other.seed)
        elif draw < 0.52 and len(other.originals) == len(new.originals) == 1 and not other.same_as:
            whose = f"{other.name}.{other.originals[0]}"
            new = Holder(name, other.stored, new.api, new.chain, new.seed, tied_to=whose)
        if not new.same_as and rng.random() < 0.2:
            new = replace(new, chain=(*new.chain, Link("Reads", 0, of=other.name)))
        holders.append(new)
    if rng.random() < singular and "Exponential" not in barred:
        # Singular: evaluating it raises, so nobody but a body that never runs reads it.
        holders.append(Holder("singular", api="property", chain=(Link("Inverse", 0),), seed=-1))
    return tuple(holders)


def _holder(rng: Random, name: str, barred: set[str]) -> Holder:
    api = rng.choices(["torch", "fxparam", "property"], [40, 35, 25])[0]
    stored = rng.choices(["parameter", "buffer"], [72, 28])[0]
    kinds = rng.sample(_PURE, rng.choice([1, 1, 2, 2, 3]))
    if rng.random() < 0.2:
        kinds.insert(rng.randrange(len(kinds) + 1), rng.choice(_IMPURE))
    if rng.random() < 0.25 and api != "property" and stored == "parameter":
        kinds.insert(0, rng.choice(_FIRST))
    if api == "property":
        barred = barred | {"spectral_norm"}
    kinds = [kind for kind in kinds if kind not in barred] or ["Symmetric"]
    chain = tuple(Link(kind, rng.randrange(100)) for kind in kinds)
    return Holder(name, stored, api, chain, rng.randrange(1000))
