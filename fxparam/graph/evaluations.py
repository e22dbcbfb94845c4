"""Which nodes evaluate which parametrized tensor.

Names and regions come from ``meta["nn_module_stack"]``, where Dynamo and export record the
modules a node was traced in. They are for people (the report) and for telling a parametrization
from other code; sharing does not depend on them, since frames resumed after a graph break may
carry none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Evaluation", "evaluations", "owner"]


@dataclass(frozen=True)
class Evaluation:
    """The nodes of one run of a parametrization.

    Attributes:
        name: qualified name of the parametrized tensor, as ``cell.weight``.
        nodes: in graph order.
        runs: how many times one run of the outermost graph runs them; None if not known.
        access: the call of the parametrization list, as traced; empty for a value that none made.
    """

    name: str
    nodes: tuple[Node, ...]
    runs: int | None = 1
    access: str = ""


def owner(node: Node) -> tuple[str, str] | None:
    """The outermost ``ParametrizationList`` a node was traced in: its call and its name."""
    for call, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        if _is_list(kind):
            return call, _readable(path)
    return None


def _is_list(kind: type | str) -> bool:
    """Whether a module stack's entry is a ``ParametrizationList``: export keeps classes by name."""
    if isinstance(kind, str):
        return kind.rpartition(".")[2] == ParametrizationList.__name__
    return issubclass(kind, ParametrizationList)


def evaluations(graph: Graph, runs: int | None = 1) -> list[Evaluation]:
    """Every evaluation in a graph, in the order of their first nodes."""
    found: dict[tuple[str, str], list[Node]] = {}
    for node in graph.nodes:
        key = owner(node) if node.op in ("call_function", "call_method", "call_module") else None
        if key is not None:
            found.setdefault(key, []).append(node)
    return [Evaluation(name, tuple(nodes), runs, access) for (access, name), nodes in found.items()]


def _readable(path: str) -> str:
    """``L['self'].cell.parametrizations.weight`` as ``cell.weight``."""
    # Strict export wraps the model, and unwraps the names but for those in bodies.
    path = path.replace("parametrizations.", "").removeprefix("_export_root.")
    # A function that closes over a module is read through the function.
    path = path.rpartition(".cell_contents.")[2]
    _, bracket, rest = path.partition("'].")
    return rest if bracket else path
