"""Marks that a ``cached()`` region leaves on the nodes traced in it, in ``meta["custom"]``."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

__all__ = [
    "AROUND",
    "EVALUATION",
    "REGION",
    "VALUE",
    "EvaluationMark",
    "distinguish",
    "drop_marks_of_other_traces",
    "evaluation_marks",
    "evaluation_of_value",
    "is_for_a_region_around",
    "join",
    "region_mark",
    "take_off_value_marks",
    "within",
]

REGION = "fxparam.region"
EVALUATION = "fxparam.evaluation"
#: On the node of an evaluation's value, where that matters: the parametrization list.
VALUE = "fxparam.value"
#: What the mark of a region ends with in which the whole graph is run.
AROUND = ".around"
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


def is_for_a_region_around(node: Node) -> bool:
    """Whether a node is a part of an evaluation for the region in which the whole graph is run."""
    marks = evaluation_marks(node)
    return bool(marks) and marks[0].region.endswith(AROUND)


def within(outer: str, mark: str) -> str:
    """What marks the nodes of an evaluation that is a part of another."""
    return f"{outer}{_WITHIN}{mark}" if outer else mark


def distinguish(node: Node, call: str) -> None:
    """Make the evaluations of a node copied out of a body others for each call of the body."""
    marks = node.meta.get("custom") or {}
    if EVALUATION in marks:
        parts = (f"{part} {call}" for part in marks[EVALUATION].split(_WITHIN))
        node.meta["custom"] = {**marks, EVALUATION: _WITHIN.join(parts)}


def take_off_value_marks(gm: GraphModule) -> None:
    """Mark the values of evaluations, in place of the aliases that were traced to mark them."""
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in list(module.graph.nodes):
            marks = node.meta.get("custom") or {}
            if VALUE not in marks or node.op != "call_function":
                continue  # what is lifted into a body then is marked as well
            (value,) = node.all_input_nodes
            if value.op.startswith("call"):
                value.meta["custom"] = {**(value.meta.get("custom") or {}), VALUE: marks[VALUE]}
            node.replace_all_uses_with(value)
            module.graph.erase_node(node)


def evaluation_of_value(node: Node) -> str | None:
    """The parametrization list whose value a node is, if it was marked."""
    return (node.meta.get("custom") or {}).get(VALUE)


def join(node: Node, other: Node) -> None:
    """Make a node a part of the evaluations that another is a part of."""
    node.meta["custom"] = {**node.meta["custom"], EVALUATION: other.meta["custom"][EVALUATION]}


def drop_marks_of_other_traces(gm: GraphModule, trace: int) -> None:
    """Forget marks that were left behind by a trace before the one that made the graph."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            marks = node.meta.get("custom") or {}
            for key in (REGION, EVALUATION, VALUE):
                if key in marks and not marks[key].startswith(f"{trace}."):
                    marks = {k: v for k, v in marks.items() if k != key}
                    node.meta["custom"] = marks
