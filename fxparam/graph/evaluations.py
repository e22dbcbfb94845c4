"""Which nodes evaluate which parametrized tensor.

Names and regions come from ``meta["nn_module_stack"]``, where Dynamo and export record the
modules a node was traced in. They are for people (the report) and for telling a parametrization
from other code; sharing does not depend on them, since frames resumed after a graph break may
carry none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Graph, Node
from torch.nn.utils.parametrize import ParametrizationList

from fxparam.graph.nodes import is_view, value_of

if TYPE_CHECKING:
    from fxparam.graph.scopes import Scope

__all__ = ["Evaluation", "evaluations", "owner", "sites_of", "values"]


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


def values(scope: Scope) -> list[Evaluation]:
    """Parameter-derived values that no ``ParametrizationList`` computes and the rest reads."""
    found, derived = [], scope.derived
    for node in scope.gm.graph.nodes:
        if node not in derived.candidates or owner(node) is not None or is_view(node):
            continue
        if any(user not in derived.nodes or is_view(user) for user in node.users):
            found.append(Evaluation(_described(scope, node), (node,), scope.runs))
    return found


def sites_of(scopes: Iterable[Scope]) -> list[Evaluation]:
    """Every evaluation in some graphs, of parametrized tensors and of others."""
    found = []
    for scope in scopes:
        found += evaluations(scope.gm.graph, scope.runs)
        found += values(scope)
    return found


def _described(scope: Scope, node: Node) -> str:
    """``matrix_exp(p)`` for a value without a name of its own."""
    from fxparam.graph.scopes import inputs_in_each_run

    op = getattr(node.target, "__name__", str(node.target))
    inputs = next(inputs_in_each_run(scope, [node]), ())
    names = {_named(str(n.target)) for n in inputs if value_of(n) is not None}
    return f"{op}({', '.join(sorted(names))})"


def _named(placeholder: str) -> str:
    """``l_self_modules_cell_parameters_weight_``, as Dynamo spells an input, as ``cell.weight``."""
    name = re.sub(r"(?i)^l_[a-z]+_(?=modules_|parameters_|buffers_)", "", placeholder)
    name = re.sub(r"_?(modules|parameters|buffers)_", ".", name)
    return name.strip("._")


def _readable(path: str) -> str:
    """``L['self'].cell.parametrizations.weight`` as ``cell.weight``."""
    # Strict export wraps the model, and unwraps the names but for those in bodies.
    path = path.replace("parametrizations.", "").removeprefix("_export_root.")
    _, bracket, rest = path.partition("'].")
    return rest if bracket else path
