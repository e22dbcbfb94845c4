"""Looking at nodes: their example values, the tensors in those, and the attributes they name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._private import storage_identity, tree_flatten

__all__ = ["ancestors", "attribute_of", "body_of", "is_view", "meta_with", "tensors_in", "value_of"]


def value_of(node: Node) -> Any:
    """The node's example value, as Dynamo (``example_value``) or export (``val``) left it."""
    return node.meta.get("example_value", node.meta.get("val"))


def meta_with(node: Node, value: Any) -> dict[str, Any]:
    """The node's metadata, for one that has another example value."""
    key = "example_value" if "example_value" in node.meta else "val"
    return {**node.meta, key: value}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, however nested, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def attribute_of(gm: GraphModule, node: Node) -> Any:
    """What a ``get_attr`` node names."""
    return operator.attrgetter(str(node.target))(gm)


def body_of(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph that a node hands to a higher-order op, if it is one."""
    value = attribute_of(gm, node) if node.op == "get_attr" else None
    return value if isinstance(value, GraphModule) else None


def ancestors(nodes: Iterable[Node], within: Callable[[Node], bool] = lambda _: True) -> set[Node]:
    """Nodes and what they are computed from, as far as a path of nodes ``within`` leads."""
    found: set[Node] = set()
    work = list(nodes)
    while work:
        node = work.pop()
        if node not in found and within(node):
            found.add(node)
            work.extend(node.all_input_nodes)
    return found


def is_view(node: Node) -> bool:
    """Whether the node's value shows the memory of one of its inputs."""
    inputs = {storage_of(t) for n in node.all_input_nodes for t in tensors_in(value_of(n))}
    outputs = [storage_of(t) for t in tensors_in(value_of(node))]
    return bool(outputs) and all(s is not None and s in inputs for s in outputs)


def storage_of(tensor: torch.Tensor) -> object:
    """What tensors of the same memory have in common; None for one without a storage."""
    return storage_identity(tensor)[1]
