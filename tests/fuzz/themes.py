"""Programs about one thing, which general programs seldom meet.

Every fourth seed is of a program about a theme, the themes in turn; the other seeds are general.

What does not pass yet is switched off; ``--with``, or a name in ``SWITCHED_ON``, switches it on:

``rounded``           a value has fewer bits on the way, and as many as its original in the end
``traced effects``    a recurrent layer is traced, whose evaluations write or draw
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from tests.fuzz import themed_statements  # noqa: F401  registers them
from tests.fuzz.grammar import HIGHER_ORDER, Writer
from tests.fuzz.holders import barred_links, some_holders
from tests.fuzz.program import Holder, Link, Program, walk

GATED = ("rounded", "traced effects")
#: Of these, what the programs have.
SWITCHED_ON: set[str] = set()

_EVERY = 4


def theme_of(seed: int) -> str:
    """The theme of a seed's program; none if it is general, or if the theme is off."""
    turn, rest = divmod(seed, _EVERY)
    theme = IN_TURN[turn % len(IN_TURN)]
    return theme if not rest and is_on(theme) else ""


def is_on(theme: str) -> bool:
    """Whether this torch has what the theme is about, and what it needs is switched on."""
    return _IS_ON.get(theme, lambda: True)()


def seeds_of(theme: str, start: int = 0) -> Iterator[int]:
    """The seeds of the programs about a theme."""
    round_ = _EVERY * len(IN_TURN)
    first = _EVERY * IN_TURN.index(theme)
    seed = start + (first - start) % round_
    while True:
        yield seed
        seed += round_


def themed(seed: int, theme: str) -> Program:
    """The program of a seed, about a theme."""
    return THEMES[theme](seed, Random(f"{theme} {seed}"))


def _narrow(seed: int, rng: Random) -> Program:
    """Gradients in fewer bits than the originals; whatever else is in float32."""
    links = ["Symmetric", "Softplus", "Scaled", "Quantised"]
    kinds = rng.sample(links, rng.choice([1, 2]))
    casts = ["ToHalf", "ToBrain", ""]
    if "rounded" in SWITCHED_ON:
        casts.append("Rounded")
    cast = rng.choice(casts)
    if cast:
        kinds.insert(rng.choice([len(kinds), len(kinds), 0]), cast)
    chain = tuple(Link(kind, rng.randrange(100)) for kind in kinds)
    api = rng.choice(["torch", "fxparam", "property"])
    holder = Holder("narrow", api=api, chain=chain, seed=rng.randrange(1000))
    program = _program(
        seed,
        rng,
        "narrow",
        dtype="float32",
        grad=True,
        inner=rng.choice(["eager", "aot_eager"]),
        apart=holder,
        weights={
            "narrow reads": 40,
            "narrow body": 25,
            "narrow scan": 25,
            "write to the narrow original": 3,
        },
        allows=lambda kind: kind != "autocast",
        most={"narrow reads": 1, "narrow body": 1, "narrow scan": 1},
        # Rounded on the way, the gradients of all readers are rounded once instead of each.
        tolerance=2e-3 if cast == "Rounded" else 1e-4,
    )
    # Compiled, a region holds in checkpoints too, and has one gradient for all accesses.
    regions = [s for s in walk(program.statements) if s.kind == "cached"]
    if any(s.kind == "narrow body" for region in regions for s in walk((region,))):
        return replace(program, tolerance=2e-3)
    return program


def _sizes(seed: int, rng: Random) -> Program:
    return _program(
        seed,
        rng,
        "sizes",
        dtype=rng.choice(["float64", "float64", "float32"]),
        grad=rng.random() < 0.5,
        weights={"sizes that data decide": 80},
        allows=lambda kind: kind not in HIGHER_ORDER,
        flags=("capture_dynamic_output_shape_ops", "capture_scalar_outputs"),
    )


def _regions(seed: int, rng: Random) -> Program:
    return _program(
        seed,
        rng,
        "regions",
        dtype="float64",
        grad=rng.random() < 0.7,
        inner="aot_eager",
        weights={"region of many calls": 60},
    )


def _switch(seed: int, rng: Random) -> Program:
    return _program(
        seed,
        rng,
        "switch",
        dtype="float64",
        grad=rng.random() < 0.6,
        singular=0.3,
        weights={"switch": 50},
    )


_LAYERS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
# What can be traced without running.
_STRAIGHT = {"use", "call", "loop", "bind", "show", "read original"}


def _recurrent(seed: int, rng: Random) -> Program:
    capture = rng.choices(["compile", "trace", "trace by Dynamo"], [60, 5, 35])[0]
    layer, api = rng.choice(_LAYERS), rng.choice(["torch", "fxparam"])
    links = ["Softplus", "Scaled", "WorksInPlace"]
    links += ["Quantised", "Bounded"] if capture == "compile" else []
    if capture == "compile" or "traced effects" in SWITCHED_ON:
        links += ["DropoutMask", "Counter"]
    chain = tuple(Link(k, rng.randrange(100)) for k in rng.sample(links, rng.choice([1, 1, 2])))
    weights = {"recurrent layer": 60, "read a recurrent weight": 15}
    if capture == "compile":
        weights["write to a recurrent original"] = 8
    return _program(
        seed,
        rng,
        "recurrent",
        dtype=rng.choice(["float64", "float32"]),
        grad=rng.random() < 0.8,
        apart=Holder(
            "recurrent",
            api=api,
            chain=chain,
            seed=rng.randrange(1000),
            layer=layer,
        ),
        weights=weights,
        barred=set() if capture == "compile" else {"Quantised", "Bounded"},
        allows=lambda kind: capture == "compile" or kind in _STRAIGHT,
        capture=capture,
        flags=("allow_rnn",) if rng.random() < 0.75 else (),
    )


def _overwritten(seed: int, rng: Random) -> Program:
    """What backward would compute again is drawn, or read from a buffer that is written since."""
    what = rng.choice(["Drawn", "Overwritten", "Phased"])
    between = rng.choice(["eager code", "a graph", "data"]) if what == "Phased" else ""
    kinds = rng.sample(["Symmetric", "Softplus", "Scaled"], rng.choice([0, 1]))
    kinds.insert(rng.randrange(len(kinds) + 1), what)
    chain = tuple(Link(kind, rng.randrange(100)) for kind in kinds)
    # What a property reads from a buffer is not saved, as outside of evaluations.
    api = rng.choice(["torch", "fxparam", "property"] if what == "Drawn" else ["torch", "fxparam"])
    return _program(
        seed,
        rng,
        "overwritten",
        dtype="float64",
        grad=True,
        inner="aot_eager",
        training=True,
        holders=(Holder("a", api=api, chain=chain, seed=rng.randrange(1000)),),
        allows=lambda kind: kind in _STRAIGHT,
        budget=rng.choice([0.0, 0.2, 0.5, 1.0 if what == "Phased" else 0.5]),
        between=between,
    )


def _held(seed: int, rng: Random) -> Program:
    """Values that are held, and what ends that: writes, and other modes."""
    kinds = ["Symmetric", "Softplus", "Scaled", "Bounded", "LowRank"]
    holders = tuple(
        Holder(
            name,
            api="fxparam",
            chain=(Link(rng.choice(kinds), rng.randrange(100)),),
            seed=rng.randrange(1000),
        )
        for name in rng.choice(["a", "ab"])
    )
    modes = {"no_grad": 40, "autocast": 20}
    writes = {"write to an original": 25, "write to the value": 15}
    return _program(
        seed,
        rng,
        "held",
        dtype=rng.choice(["float64", "float32"]),
        grad=rng.random() < 0.8,
        holders=holders,
        weights={"cached": 40, "graph break": 30, **writes, **modes},
        allows=lambda kind: kind in _STRAIGHT,
    )


def _alike(seed: int, rng: Random) -> Program:
    """The same parametrizations of several tensors, which become one batch."""
    first = rng.choice(["Exponential", "orthogonal", "cayley"])
    kinds = rng.sample(["Symmetric", "Skew", "Scaled", "LowRank", "Transposed"], rng.choice([0, 1]))
    kinds.insert(0 if first != "Exponential" else rng.randrange(len(kinds) + 1), first)
    chain = tuple(Link(kind, rng.randrange(100)) for kind in kinds)
    api = rng.choice(["torch", "fxparam"])
    holders = tuple(
        Holder(name, api=api, chain=chain, seed=rng.randrange(1000))
        for name in rng.choice(["ab", "abc", "abc"])
    )
    return _program(
        seed,
        rng,
        "alike",
        dtype=rng.choice(["float64", "float64", "float32"]),
        grad=rng.random() < 0.8,
        holders=holders,
        weights={"call": 60},
    )


THEMES: dict[str, Callable[[int, Random], Program]] = {
    "narrow": _narrow,
    "sizes": _sizes,
    "regions": _regions,
    "recurrent": _recurrent,
    "switch": _switch,
    "overwritten": _overwritten,
    "held": _held,
    "alike": _alike,
}
#: Those that seeds take turns with; the others are asked for by name.
IN_TURN = tuple(theme for theme in THEMES if theme not in ("held", "alike"))


_IS_ON: dict[str, Callable[[], bool]] = {
    "switch": lambda: importlib.util.find_spec("torch._higher_order_ops.switch") is not None,
}


def _program(
    seed: int,
    rng: Random,
    theme: str,
    *,
    dtype: str,
    grad: bool,
    inner: str = "",
    training: bool | None = None,
    holders: tuple[Holder, ...] = (),
    apart: Holder | None = None,
    barred: set[str] | None = None,
    singular: float = 0.02,
    weights: dict[str, int] | None = None,
    allows: Callable[[str], bool] = lambda kind: True,
    most: dict[str, int] | None = None,
    **rest: Any,
) -> Program:
    inner = inner or rng.choice(["eager", "aot_eager"])
    barred = barred_links(dtype) | (barred or set())
    holders = holders or some_holders(rng, barred, singular=singular)
    if apart:
        holders += (apart,)
    writer = Writer(
        rng,
        holders,
        dtype=dtype,
        grad=grad,
        inner=inner,
        weights=weights,
        allows=allows,
        most=most,
    )
    return Program(
        seed=seed,
        size=rng.choice([2, 3, 3, 4]),
        dtype=dtype,
        inner=inner,
        training=rng.random() < 0.75 if training is None else training,
        grad=grad,
        caller_writes=rng.random() < 0.2 and theme != "overwritten",
        holders=holders,
        statements=writer.program(),
        theme=theme,
        **rest,
    )
