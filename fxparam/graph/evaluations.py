"""Which nodes evaluate which parametrized tensor.

Names and regions come from ``meta["nn_module_stack"]``, where Dynamo and export record the
modules a node was traced in. They are for people (the report) and for telling a parametrization
from other code; sharing does not depend on them, since frames resumed after a graph break may
carry none.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Evaluation", "evaluations", "modules_around", "owner"]

_LIST = re.compile(rf"(.*\.)?(Parametrized)*{ParametrizationList.__name__}")
# A list is ``parametrizations.<tensor>`` of the module that has the tensor.
_OF_THE_LIST = re.compile(r"(^|\.)parametrizations\.(?=[^.]+$)")


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


def modules_around(node: Node) -> dict[str, Any]:
    """The module stack of a node up to the ``ParametrizationList`` it was traced in."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return dict(itertools.takewhile(lambda entry: not _is_list(entry[1][1]), stack.items()))


def _is_list(kind: type | str) -> bool:
    """Whether a module stack's entry is a ``ParametrizationList``: export keeps classes by name.

    The class of a list with a parametrized original is made by ``register_parametrization``, which
    puts ``Parametrized`` in front of the name.
    """
    if isinstance(kind, str):
        return _LIST.fullmatch(kind) is not None
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
    path = _OF_THE_LIST.sub(r"\1", path).removeprefix("_export_root.")
    # A function that closes over a module is read through the function.
    path = path.rpartition(".cell_contents.")[2]
    _, bracket, rest = path.partition("'].")
    return rest if bracket else path
