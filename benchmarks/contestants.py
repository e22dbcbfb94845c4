"""The ways to run a case: which source, compiled by what, sharing for how long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from benchmarks.cases.case import Case

__all__ = ["BY_HAND", "CONTESTANTS", "Contestant", "contestants_for"]


@dataclass(frozen=True)
class Contestant:
    """Attributes:
    name, about: as given to ``--contestant``, and one line.
    source: the model as written, hoisted by hand, or without parametrizations.
    compiler: a backend of ``torch.compile``; None for eager.
    scope: ``cached()`` of torch around the model's call (``torch``); the same of fxparam
        (``region``), or around the step (``around``); ``accumulate()`` around the step
        (``step``); of ``fxparam.compile``; or an export that folds.
    options: of ``fxparam.backend``.
    adopted: whether fxparam's registration takes the place of torch's.
    freezing: Inductor's option that folds weights into constants.
    quick: whether it is among the contestants of ``--quick``.
    """

    name: str
    about: str
    source: Literal["written", "by hand", "plain"] = "written"
    compiler: Literal["inductor", "fxparam"] | None = None
    scope: Literal["torch", "region", "around", "call", "step", "frozen", "fold"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adopted: bool = False
    freezing: bool = False
    quick: bool = False

    def shares_effects(self) -> bool:
        """Checks whether an evaluation that writes buffers is shared, as its user decided."""
        return self.scope is not None or self.source != "written"

    def is_another_program(self, case: Case) -> bool:
        """Checks whether it evaluates at each access where that has effects, not once."""
        return case.effects and not self.shares_effects()


#: The limit of sharing: what every figure is a ratio to.
BY_HAND = "by-hand"

_LIMIT = "hoisted by hand, Inductor: the limit of sharing"
_EVERYWHERE = (
    Contestant("eager", "eager", quick=True),
    Contestant("eager-cached", "eager in torch's cached()", scope="torch"),
    Contestant("eager-fxparam-cached", "eager in fxparam's cached()", scope="region"),
    Contestant("inductor", "Inductor as written", compiler="inductor", quick=True),
    Contestant("inductor-cached", "in torch's cached()", compiler="inductor", scope="torch"),
    Contestant(BY_HAND, _LIMIT, source="by hand", compiler="inductor", quick=True),
    Contestant("plain", "plain weights: the floor", source="plain", compiler="inductor"),
    Contestant("fxparam", "fxparam as written", compiler="fxparam", quick=True),
)
_ours = partial(Contestant, compiler="fxparam")
_WHERE_ASKED = (
    Contestant("inductor-freezing", "Inductor with freezing", compiler="inductor", freezing=True),
    _ours("fxparam-no-lower", "fxparam with lower=False", options={"lower": False}),
    _ours("fxparam-no-batch", "fxparam with batch=False", options={"batch": False}),
    _ours("fxparam-adopted", "weights registered by fxparam, not by torch", adopted=True),
    _ours("fxparam-region", "its cached() in what is compiled", scope="region"),
    _ours("fxparam-around", "its cached() around the step", scope="around"),
    _ours("fxparam-call", 'scope="call"', scope="call"),
    _ours("fxparam-step", "accumulate() around the micro-batches", scope="step"),
    _ours("fxparam-frozen", 'scope="frozen"', scope="frozen"),
    _ours("fxparam-fold", "fxparam.export with fold=True", scope="fold"),
)
CONTESTANTS = {each.name: each for each in (*_EVERYWHERE, *_WHERE_ASKED)}


def contestants_for(case: Case, names: Iterable[str]) -> list[Contestant]:
    """Return those of ``names`` that say something in a case, and the one by hand, for ratios."""
    wanted = {*names, BY_HAND}
    return [c for name, c in CONTESTANTS.items() if name in wanted and _applies(c, case)]


def _applies(contestant: Contestant, case: Case) -> bool:
    name = contestant.name
    if contestant in _WHERE_ASKED:
        return name in case.also
    if case.reads_once and (contestant.scope is not None or name == "inductor"):
        return False  # there is nothing to share: it would be the one by hand, or eager
    return not (case.eager_by_hand and name in ("inductor", "inductor-cached"))
