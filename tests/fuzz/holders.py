"""From a seed to a program: the modules with a parametrized tensor that it has."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tests.fuzz.program import Holder, Link

_PURE = (
    *("Symmetric", "Skew", "Exponential", "Mask", "LowRank", "Scaled", "Softplus"),
    *("Identity", "Transposed", "WorksInPlace", "Quantised", "Bounded"),
)
_IMPURE = ("DropoutMask", "Counter", "Iterated", "spectral_norm", "Normalized")
_FIRST = ("orthogonal", "cayley", "weight_norm", "Product")
_REAL = {"Softplus", "Normalized", "DropoutMask", *_FIRST, "spectral_norm"} - {"Product"}
_WIDE = {"Exponential", "orthogonal", "cayley", "spectral_norm"}


def barred_links(dtype: str) -> set[str]:
    """Parametrizations that a dtype has no kernels for, or too few digits."""
    return {"complex64": _REAL, "bfloat16": _WIDE | {"Normalized"}}.get(dtype, set())


def some_holders(rng: Random, barred: set[str], *, singular: float) -> tuple[Holder, ...]:
    """One to three, and one that may not be read with the chance ``singular``."""
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
