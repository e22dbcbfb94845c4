"""Marks that a ``cached()`` region leaves on the nodes traced in it, in ``meta["custom"]``.

Dynamo takes over strings, so that marks are strings: each begins with the number of the trace that
made it, since a trace that ends early leaves its marks to the next. How they are spelled is known
here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

__all__ = [
    "EVALUATION",
    "READS",
    "REGION",
    "VALUE",
    "EvaluationMark",
    "count_read",
    "distinguish",
    "evaluation",
    "evaluation_marks",
    "evaluation_of_value",
    "is_for_a_region_around",
    "is_of_trace",
    "join",
    "reads",
    "region",
    "region_around",
    "region_mark",
    "settle",
    "unmarked",
    "value",
    "within_evaluation",
]

#: The key of the region that a node was traced in.
REGION = "fxparam.region"
#: The key of the evaluations that a node is a part of.
EVALUATION = "fxparam.evaluation"
#: The key, on the node of an evaluation's value, of its parametrization list.
VALUE = "fxparam.value"
#: The key, on the node of an evaluation's value, of how many reads it was given to in the trace.
READS = "fxparam.reads"
# What the mark of a region ends with in which the whole graph is run.
_AROUND = ".around"
_WITHIN = "|"
_KEYS = (REGION, EVALUATION, VALUE, READS)


def region(trace: int, number: int) -> str:
    """Spell the mark of a region in a trace."""
    return f"{trace}.{number}"


def region_around(trace: int) -> str:
    """Spell the mark of the region in which the whole graph is run."""
    return f"{trace}{_AROUND}"


def value(trace: int, chain: int) -> str:
    """Spell what stands for a parametrization list, known by its identity."""
    return f"{trace}.{chain}"


def count_read(node: Node, trace: int) -> None:
    """Note on the node of a value that one more read has it."""
    custom = node.meta.get("custom") or {}
    node.meta["custom"] = {**custom, READS: f"{trace}.{reads(node) + 1}"}


def reads(node: Node) -> int:
    """Return how many reads have the value of a node, of those that Dynamo traced."""
    mark: str = (node.meta.get("custom") or {}).get(READS, "")
    return int(mark.rpartition(".")[2]) if mark else 1


def evaluation(around: str, chain: str, training: str, modes: str, number: int) -> str:
    """Spell the mark of one evaluation.

    Args:
        around: the mark of the evaluation that it is a part of; empty for none.
        chain: what stands for the parametrization list, from :func:`value`.
        training: the training modes of its modules.
        modes: the modes it is read under.
        number: its own.
    """
    own = f"{chain} {training} {modes} {number}"
    return f"{around}{_WITHIN}{own}" if around else own


def is_of_trace(mark: str, trace: int) -> bool:
    """Check whether a mark was made in a trace."""
    return mark.startswith(f"{trace}.")


def region_mark(node: Node) -> str | None:
    """Return the mark of the outermost region a node was traced in."""
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

    @property
    def identity(self) -> int:
        """The identity of the parametrization list."""
        return int(self.chain.rpartition(".")[2])


def evaluation_marks(node: Node) -> tuple[EvaluationMark, ...]:
    """Return the evaluations in regions that a node is a part of, each in the one before it."""
    marks = node.meta.get("custom") or {}
    if EVALUATION not in marks or REGION not in marks:
        return ()
    parts = (part.split(" ", 3) for part in marks[EVALUATION].split(_WITHIN))
    return tuple(EvaluationMark(marks[REGION], *part) for part in parts)


def is_for_a_region_around(node: Node) -> bool:
    """Check whether a node evaluates for the region in which the whole graph is run."""
    marks = evaluation_marks(node)
    return bool(marks) and marks[0].region.endswith(_AROUND)


def unmarked(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a node without our marks."""
    custom = {k: v for k, v in (meta.get("custom") or {}).items() if k not in _KEYS}
    return {**meta, "custom": custom} if "custom" in meta else meta


def distinguish(node: Node, call: str) -> None:
    """Make the evaluations of a node copied out of a body others for each call of the body."""
    marks = node.meta.get("custom") or {}
    if EVALUATION in marks:
        parts = (f"{part} {call}" for part in marks[EVALUATION].split(_WITHIN))
        node.meta["custom"] = {**marks, EVALUATION: _WITHIN.join(parts)}


def evaluation_of_value(node: Node) -> str | None:
    """Return the parametrization list whose value a node is, if it was marked."""
    return (node.meta.get("custom") or {}).get(VALUE)


def within_evaluation(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a node for one that is a part of its evaluations, not their value."""
    custom = {k: v for k, v in (meta.get("custom") or {}).items() if k not in (VALUE, READS)}
    return {**meta, "custom": custom} if "custom" in meta else dict(meta)


def join(node: Node, other: Node) -> None:
    """Make a node a part of the evaluations that another is a part of."""
    node.meta["custom"] = {**node.meta["custom"], EVALUATION: other.meta["custom"][EVALUATION]}


def settle(gm: GraphModule, trace: int) -> None:
    """Make a graph's marks those of the trace that made it, each on the node that it is about.

    Marks that an earlier trace left behind are dropped. The alias that was traced to mark the value
    of an evaluation gives way to that value.
    """
    nodes = list(_nodes(gm))
    for _, node in nodes:
        found = node.meta.get("custom") or {}
        foreign = [k for k in _KEYS if k in found and not is_of_trace(found[k], trace)]
        if foreign:
            node.meta["custom"] = {k: v for k, v in found.items() if k not in foreign}
    for module, node in nodes:
        found = node.meta.get("custom") or {}
        if VALUE not in found or node.op != "call_function":
            continue  # what is lifted into a body then is marked as well
        (marked,) = node.all_input_nodes
        if marked.op.startswith("call"):
            marked.meta["custom"] = {**(marked.meta.get("custom") or {}), VALUE: found[VALUE]}
        node.replace_all_uses_with(marked)
        module.graph.erase_node(node)


def _nodes(gm: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """Yield the nodes of a graph and of the bodies in it, with their graphs."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                yield module, node
