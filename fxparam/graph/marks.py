"""Marks that a ``cached()`` region leaves on the nodes traced in it, in ``meta["custom"]``."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

__all__ = [
    "EVALUATION",
    "REGION",
    "EvaluationMark",
    "distinguish",
    "drop_marks_of_other_traces",
    "evaluation_marks",
    "join",
    "region_mark",
    "within",
]

REGION = "fxparam.region"
EVALUATION = "fxparam.evaluation"
_WITHIN = "|"


def region_mark(node: Node) -> str | None:
    """The outermost region a node was traced in."""
    return (node.meta.get("custom") or {}).get(REGION)


@dataclass(frozen=True)
class EvaluationMark:
    """One evaluation.

    Attributes:
        region: the outermost region it is in.
        chain: the parametrization list.
        training: the training modes of its modules.
        modes: the modes it is read under.
        number: its own.
    """

    region: str
    chain: str
    training: str
    modes: str
    number: str


def evaluation_marks(node: Node) -> tuple[EvaluationMark, ...]:
    """The evaluations in regions that a node is a part of, each in the one before it."""
    marks = node.meta.get("custom") or {}
    if EVALUATION not in marks or REGION not in marks:
        return ()
    parts = (part.split(" ", 3) for part in marks[EVALUATION].split(_WITHIN))
    return tuple(EvaluationMark(marks[REGION], *part) for part in parts)


def within(outer: str, mark: str) -> str:
    """What marks the nodes of an evaluation that is a part of another."""
    return f"{outer}{_WITHIN}{mark}" if outer else mark


def distinguish(node: Node, call: str) -> None:
    """Make the evaluations of a node copied out of a body others for each call of the body."""
    marks = node.meta.get("custom") or {}
    if EVALUATION in marks:
        parts = (f"{part} {call}" for part in marks[EVALUATION].split(_WITHIN))
        node.meta["custom"] = {**marks, EVALUATION: _WITHIN.join(parts)}


def join(node: Node, other: Node) -> None:
    """Make a node a part of the evaluations that another is a part of."""
    node.meta["custom"] = {**node.meta["custom"], EVALUATION: other.meta["custom"][EVALUATION]}


def drop_marks_of_other_traces(gm: GraphModule, trace: int) -> None:
    """Forget marks that were left behind by a trace before the one that made the graph."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            marks = node.meta.get("custom") or {}
            for key in (REGION, EVALUATION):
                if key in marks and not marks[key].startswith(f"{trace}."):
                    marks = {k: v for k, v in marks.items() if k != key}
                    node.meta["custom"] = marks
