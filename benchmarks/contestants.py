"""The ways to run a case: which source, in which region, compiled by what."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from benchmarks.cases.case import Case

__all__ = ["BY_HAND", "CONTESTANTS", "QUICK", "Contestant", "contestants_for", "unavailable"]


@dataclass(frozen=True)
class Contestant:
    """Attributes:
    name: as given to ``--contestant``.
    about: one line.
    source: the model as written, with its weights read once by hand, or without parametrizations.
    region: what the model's call is put in: torch's ``cached()``, or what fxparam is asked for.
    compiler: None for eager.
    freezing: Inductor's option that folds weights into constants, for inference.
    """

    name: str
    about: str
    source: Literal["written", "by hand", "plain"] = "written"
    region: Literal["torch", "fxparam"] | None = None
    compiler: Literal["inductor", "fxparam", "jax"] | None = None
    freezing: bool = False

    @property
    def shares_on_request(self) -> bool:
        """Whether evaluations with effects are shared too, which only its user can decide."""
        return self.region is not None or self.source != "written"

    def computes_another_program(self, case: Case) -> bool:
        """Than the source hoisted by hand: it evaluates at each access, and that has effects."""
        return case.effects and not self.shares_on_request

    def applies_to(self, case: Case) -> bool:
        if self.freezing and case.train:
            return False
        if self.compiler == "jax":
            return case.jax is not None
        return self.region != "fxparam" or case.scope is not None


CONTESTANTS: dict[str, Contestant] = {
    each.name: each
    for each in (
        Contestant("eager", "eager"),
        Contestant("eager-cached", "eager in torch's cached()", region="torch"),
        Contestant("inductor", "Inductor as written", compiler="inductor"),
        Contestant(
            "inductor-cached",
            "Inductor, torch's cached() placed by hand",
            region="torch",
            compiler="inductor",
        ),
        Contestant(
            "inductor-freezing",
            "Inductor with freezing (inference)",
            compiler="inductor",
            freezing=True,
        ),
        Contestant(
            "by-hand",
            "hoisted by hand, Inductor: the limit of sharing",
            source="by hand",
            compiler="inductor",
        ),
        Contestant(
            "plain", "plain weights, Inductor: the floor", source="plain", compiler="inductor"
        ),
        Contestant("fxparam", "fxparam as written", compiler="fxparam"),
        Contestant(
            "fxparam-scope",
            "fxparam asked for more: cached(), accumulate() or fold, where they share more",
            region="fxparam",
            compiler="fxparam",
        ),
        Contestant("jax", "JAX jit as written", compiler="jax"),
        Contestant("jax-by-hand", "JAX jit, hoisted by hand", source="by hand", compiler="jax"),
    )
}

#: What every figure is a ratio to.
BY_HAND = "by-hand"

#: Those of ``--quick``.
QUICK = ("eager", "inductor", "by-hand", "fxparam")


def unavailable(contestant: Contestant) -> str | None:
    """Why it cannot run here, if it cannot."""
    if contestant.compiler == "jax" and importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    return None


def contestants_for(case: Case, names: list[str]) -> list[Contestant]:
    """Those of ``names`` that apply to a case and can run here."""
    chosen = (CONTESTANTS[name] for name in names)
    return [c for c in chosen if c.applies_to(case) and unavailable(c) is None]
