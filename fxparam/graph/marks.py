"""Marks that a ``cached()`` region leaves on the nodes traced in it, in ``meta["custom"]``."""

from __future__ import annotations

from torch.fx import GraphModule, Node

__all__ = [
    "EVALUATION",
    "REGION",
    "distinguish",
    "drop_marks_of_other_traces",
    "evaluation_mark",
    "region_mark",
]

REGION = "fxparam.region"
EVALUATION = "fxparam.evaluation"


def region_mark(node: Node) -> str | None:
    """The outermost region a node was traced in."""
    return (node.meta.get("custom") or {}).get(REGION)


def evaluation_mark(node: Node) -> tuple[str, str, str, str] | None:
    """The region, the parametrization list, its training modes and the number of an evaluation."""
    marks = node.meta.get("custom") or {}
    if EVALUATION not in marks or REGION not in marks:
        return None
    chain, training, number = marks[EVALUATION].split(" ", 2)
    return marks[REGION], chain, training, number


def distinguish(node: Node, call: str) -> None:
    """Make the evaluation of a node copied out of a body another one for each call of the body."""
    marks = node.meta.get("custom") or {}
    if EVALUATION in marks:
        node.meta["custom"] = {**marks, EVALUATION: f"{marks[EVALUATION]} {call}"}


def drop_marks_of_other_traces(gm: GraphModule, trace: int) -> None:
    """Forget marks that were left behind by a trace before the one that made the graph."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            marks = node.meta.get("custom") or {}
            for key in (REGION, EVALUATION):
                if key in marks and not marks[key].startswith(f"{trace}."):
                    marks = {k: v for k, v in marks.items() if k != key}
                    node.meta["custom"] = marks
