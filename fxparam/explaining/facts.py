"""Holds what happened to a model, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from fxparam.explaining.costs import Cost
from fxparam.explaining.picture import Picture

__all__ = [
    "Break",
    "Explained",
    "GraphExplained",
    "RefusalExplained",
    "Scope",
    "TensorExplained",
]


@dataclass(frozen=True)
class RefusalExplained:
    """Evaluations that were not shared, and what to do about it.

    Attributes:
        rule: the name of the :class:`fxparam.Rule`.
        number: which of the six rules it is; None where sharing is not worthwhile.
        reason: why, in words.
        count: how many evaluations it kept.
        where: the lines that read the tensor, as ``file:line``.
        change: what to change in the code.
    """

    rule: str
    number: int | None
    reason: str
    count: int
    where: tuple[str, ...]
    change: str

    def __str__(self) -> str:
        rule = "not worthwhile" if self.number is None else f"rule {self.number}"
        return f"{self.count} refused by {rule}, {self.reason}"


@dataclass(frozen=True)
class TensorExplained:
    """A parametrized tensor, or another value computed from parameters alone, in all graphs.

    Attributes:
        name: its qualified name; ``op(originals)`` for a value that has none.
        kind: the classes of its parametrizations; empty for a value without a name.
        accesses: how many times code of the model reads it, as captured.
        runs_before: evaluations in one call as captured, loops unrolled; None if not known.
        runs: evaluations in one call now; None if not known.
        hoisted_from: the loops and other bodies it left, with their iterations (None: not known).
        refused: why evaluations were kept.
        lowered: ops that were rewritten to a cheaper form.
        batched_with: tensors that are evaluated with it, as one.
        not_batched: why it is not batched with others like it; empty if nothing stands against it.
        forward, backward: what one evaluation costs, as captured; None if that is not known.
    """

    name: str
    kind: tuple[str, ...]
    accesses: int
    runs_before: int | None
    runs: int | None
    hoisted_from: tuple[tuple[str, int | None], ...] = ()
    refused: tuple[RefusalExplained, ...] = ()
    lowered: tuple[str, ...] = ()
    batched_with: tuple[str, ...] = ()
    not_batched: str = ""
    forward: Cost | None = None
    backward: Cost | None = None

    @property
    def saved(self) -> int | None:
        """Evaluations that one call does not run any more; None if that is not known."""
        if self.runs_before is None or self.runs is None:
            return None
        return self.runs_before - self.runs


@dataclass(frozen=True)
class Break:
    """The end of a graph before the end of the code.

    Attributes:
        reason: Dynamo's.
        where: the line, as ``file:line``; empty if it is not known.
    """

    reason: str
    where: str


@dataclass(frozen=True)
class GraphExplained:
    """One captured graph.

    Attributes:
        before, after: the graph, and what the passes made of it.
        end: the graph break behind it; None if there is none.
        calls: how many times it ran in the call of the model.
    """

    before: Picture
    after: Picture
    end: Break | None = None
    calls: int = 1


@dataclass(frozen=True)
class Scope:
    """What another scope would do.

    Attributes:
        scope: its name.
        runs: evaluations in one call under it, of all tensors.
        now: evaluations in one call now, of all tensors.
        how: what to write.
        effects: evaluations that have effects, such as random draws, are shared with them. Results
            are then not eager's.
    """

    scope: str
    runs: int
    now: int
    how: str
    effects: bool = False

    def __str__(self) -> str:
        saved = f"{self.how} would save {self.now - self.runs} of {self.now} evaluations"
        return f"{saved}, whose effects then occur once" if self.effects else saved


@dataclass(frozen=True, repr=False)
class Explained:
    """The data of an ``Explanation``, which says what they are."""

    scope: str
    graphs: tuple[GraphExplained, ...]
    tensors: tuple[TensorExplained, ...]
    scopes: tuple[Scope, ...] = ()
    extern_calls: dict[str, int] | None = None
    unseen: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()

    @property
    def saved(self) -> tuple[Cost, Cost]:
        """What one call does not do any more, forward and backward.

        Each evaluation counts as it was captured: that what is left runs in a cheaper form is not
        in it.
        """
        forward = backward = Cost()
        for each in self.tensors:
            if each.saved and each.forward and each.backward:
                forward += each.forward * each.saved
                backward += each.backward * each.saved
        return forward, backward

    @property
    def not_in_saved(self) -> tuple[str, ...]:
        """Tensors with fewer evaluations, or a number not known, of which no cost is known."""
        return tuple(
            each.name
            for each in self.tensors
            if each.kind and each.saved != 0 and None in (each.saved, each.forward)
        )
