"""What graphs evaluate: parametrized tensors, and parameter-derived values without a name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch.fx import Node

from fxparam.graph.evaluations import Evaluation, evaluations, owner
from fxparam.graph.nodes import is_view, value_of
from fxparam.graph.scopes import Scope, inputs_in_each_run

__all__ = ["sites_of"]


def sites_of(scopes: Iterable[Scope]) -> list[Evaluation]:
    """Every evaluation in some graphs, of parametrized tensors and of others."""
    found = []
    for scope in scopes:
        found += evaluations(scope.gm.graph, scope.runs)
        found += _values(scope)
    return found


def _values(scope: Scope) -> list[Evaluation]:
    """Parameter-derived values that no ``ParametrizationList`` computes and the rest reads."""
    found, derived = [], scope.derived
    for node in scope.gm.graph.nodes:
        if node not in derived.candidates or owner(node) is not None or is_view(node):
            continue
        if any(user not in derived.nodes or is_view(user) for user in node.users):
            found.append(Evaluation(_described(scope, node), (node,), scope.runs))
    return found


def _described(scope: Scope, node: Node) -> str:
    """``matrix_exp(p)`` for a value without a name of its own."""
    op = getattr(node.target, "__name__", str(node.target))
    inputs = next(inputs_in_each_run(scope, [node]), ())
    names = {_named(str(n.target)) for n in inputs if value_of(n) is not None}
    return f"{op}({', '.join(sorted(names))})"


def _named(placeholder: str) -> str:
    """``l_self_modules_cell_parameters_weight_``, as Dynamo spells an input, as ``cell.weight``."""
    name = re.sub(r"(?i)^l_[a-z]+_(?=modules_|parameters_|buffers_)", "", placeholder)
    name = re.sub(r"_?(modules|parameters|buffers)_", ".", name)
    return name.strip("._")
