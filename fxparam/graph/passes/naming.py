"""Names on the nodes of evaluations: which parametrized tensor, which step of its chain.

mul = torch.matrix_exp(sub)           cell_weight_hh = torch.matrix_exp(sub)
                                      meta["fxparam"] = Step("cell.weight_hh", 0)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxparam._torch.fx import rename
from fxparam.graph.analysis.nodes import owner

__all__ = ["STEP", "Step", "label", "step_of"]

#: Key of the metadata that :func:`label` leaves.
STEP = "fxparam"


@dataclass(frozen=True)
class Step:
    """Attributes:
    tensor: qualified name of the parametrized tensor, as ``cell.weight_hh``.
    index: place of the parametrization in its chain; None between two of them.
    """

    tensor: str
    index: int | None


def step_of(node: Node) -> Step | None:
    """Return the parametrization that a node was traced in, outermost of nested ones."""
    found = owner(node)
    if found is None:
        return None
    stack = node.meta["nn_module_stack"]
    around: str = stack[found[0]][0]
    for path, _ in stack.values():
        inner = re.fullmatch(r"\W*(\d+)\W*", path[len(around) :]) if path != around else None
        if path.startswith(around) and inner is not None:
            return Step(found[1], int(inner[1]))
    return Step(found[1], None)


def label(gm: GraphModule) -> dict[str, str]:
    """Mark the nodes of evaluations in ``meta["fxparam"]`` and name values after their tensors.

    Returns:
        New names by old ones, of the nodes that were renamed.
    """
    renamed: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        step = step_of(node)
        if step is None:
            continue
        node.meta[STEP] = step
        wanted = re.sub(r"\W", "_", step.tensor)
        if not _is_value(node) or re.fullmatch(rf"{wanted}(_\d+)?", node.name):
            continue
        old = node.name
        rename(node, wanted)
        renamed[old] = node.name
    return renamed


def _is_value(node: Node) -> bool:
    """Check whether something else than evaluations of the same tensor uses the node."""
    return any(_tensor(user) != _tensor(node) for user in node.users)


def _tensor(node: Node) -> str | None:
    found = owner(node)
    return None if found is None else found[1]
