"""Which nodes evaluate which parametrized tensor, or another parameter-derived value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Graph, Node

from fxparam.graph.analysis.nesting import Level, inputs_in_each_run
from fxparam.graph.analysis.nodes import is_view, owner, value_of

__all__ = ["Evaluation", "all_evaluations", "described", "evaluations"]


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


def evaluations(graph: Graph, runs: int | None = 1) -> list[Evaluation]:
    """Return every evaluation in a graph, in the order of their first nodes."""
    found: dict[tuple[str, str], list[Node]] = {}
    for node in graph.nodes:
        key = owner(node) if node.op in ("call_function", "call_method", "call_module") else None
        if key is not None:
            found.setdefault(key, []).append(node)
    return [Evaluation(name, tuple(nodes), runs, access) for (access, name), nodes in found.items()]


def all_evaluations(levels: Iterable[Level]) -> list[Evaluation]:
    """Return every evaluation in some graphs, of parametrized tensors and of others."""
    found = []
    for level in levels:
        found += evaluations(level.gm.graph, level.runs)
        found += _values(level)
    return found


def _values(level: Level) -> list[Evaluation]:
    """Parameter-derived values that no ``ParametrizationList`` computes and the rest reads."""
    found, derived = [], level.derived
    for node in level.gm.graph.nodes:
        if node not in derived.candidates or owner(node) is not None or is_view(node):
            continue
        if any(user not in derived.nodes or is_view(user) for user in node.users):
            found.append(Evaluation(described(level, node), (node,), level.runs))
    return found


def described(level: Level, node: Node) -> str:
    """Return a text for a value that has no name, such as ``matrix_exp(p)``."""
    op = getattr(node.target, "__name__", str(node.target))
    inputs = next(inputs_in_each_run(level, [node]), ())
    names = {_named(str(n.target)) for n in inputs if value_of(n) is not None}
    return f"{op}({', '.join(sorted(names))})"


def _named(placeholder: str) -> str:
    """``l_self_modules_cell_parameters_weight_``, as Dynamo spells an input, as ``cell.weight``."""
    name = re.sub(r"(?i)^l_[a-z]+_(?=modules_|parameters_|buffers_)", "", placeholder)
    name = re.sub(r"_?(modules|parameters|buffers)_", ".", name)
    return name.strip("._")
