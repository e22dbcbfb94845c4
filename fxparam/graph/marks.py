"""Marks that a ``cached()`` region leaves on the nodes traced in it, in ``meta["custom"]``."""

from __future__ import annotations

from torch.fx import Node

__all__ = ["EVALUATION", "REGION", "distinguish", "evaluation_mark", "region_mark"]

REGION = "fxparam.region"
EVALUATION = "fxparam.evaluation"


def region_mark(node: Node) -> str | None:
    """The outermost region a node was traced in."""
    return (node.meta.get("custom") or {}).get(REGION)


def evaluation_mark(node: Node) -> tuple[str, str, str] | None:
    """The region, the parametrization list and the number of the evaluation a node belongs to."""
    marks = node.meta.get("custom") or {}
    if EVALUATION not in marks or REGION not in marks:
        return None
    chain, _, number = marks[EVALUATION].partition(" ")
    return marks[REGION], chain, number


def distinguish(node: Node, call: str) -> None:
    """Make the evaluation of a node copied out of a body another one for each call of the body."""
    marks = node.meta.get("custom") or {}
    if EVALUATION in marks:
        node.meta["custom"] = {**marks, EVALUATION: f"{marks[EVALUATION]} {call}"}
