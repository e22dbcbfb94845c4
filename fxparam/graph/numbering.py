"""What a node computes, as a key: equal keys are the same function of the same inputs (rule 1)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from fxparam.graph.literals import literal_key
from fxparam.graph.nodes import attribute_of

__all__ = ["key_of"]


def key_of(gm: GraphModule, node: Node, number: Mapping[Node, Hashable]) -> Hashable | None:
    """The op, the literals and the numbers of the inputs; None for what computes nothing."""
    if node.op == "get_attr":
        value = attribute_of(gm, node)
        if isinstance(value, GraphModule):
            return ("body", _body_key(value))
        return ("get_attr", id(value))
    if node.op not in ("call_function", "call_method"):
        return None
    return (node.op, node.target, _key(node.args, number), _key(node.kwargs, number))


def _body_key(gm: GraphModule) -> Hashable:
    """A body by what it does: each capture of an ``autograd.Function`` has a body of its own."""
    number: dict[Node, Hashable] = {}
    keys: list[Hashable] = []
    for i, node in enumerate(gm.graph.nodes):
        number[node] = i
        if node.op == "placeholder":
            keys.append("input")
        elif node.op == "output":
            keys.append(("output", _key(node.args, number)))
        else:
            keys.append(key_of(gm, node, number) or id(node))
    # What else an op looks at in a body, as a checkpoint's policy.
    return (tuple(keys), tuple((k, literal_key(v)) for k, v in sorted(gm.meta.items())))


def _key(value: Any, number: Mapping[Node, Hashable]) -> Hashable:
    if isinstance(value, Node):
        return ("node", number[value])
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_key(v, number) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((k, _key(v, number)) for k, v in value.items()))
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ("slice", tuple(_key(v, number) for v in parts))
    return literal_key(value)
