"""Value numbering's keys: equal keys are the same function of the same inputs (rule 1).

Literals in a key are equal only when they are the same literal, type and sign included.
``1 == 1.0 == True`` and ``0.0 == -0.0`` in Python, and torch's own CSE passes merge them. A graph
that divides by ``0.0`` is not one that divides by ``-0.0``.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.nodes import attribute_of

__all__ = ["key_of", "literal_key"]

_PLAIN = (bool, int, str, bytes, type(None), type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
# Compared by an operation of a graph.
_COMPUTED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


def key_of(gm: GraphModule, node: Node, number: Mapping[Node, Hashable]) -> Hashable | None:
    """Return the op, the literals and the numbers of the inputs; None for what computes nothing."""
    if node.op == "get_attr":
        value = attribute_of(gm, node)
        if isinstance(value, GraphModule):
            return ("body", _body_key(value))
        return ("get_attr", id(value))
    if node.op not in ("call_function", "call_method"):
        return None
    return (node.op, node.target, _key(node.args, number), _key(node.kwargs, number))


def _body_key(gm: GraphModule) -> Hashable:
    """Return a key for what a body does: each capture of a Function has a body of its own."""
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


def literal_key(value: Any) -> Hashable:
    """Return a key for one literal; an object that is no literal is equal to itself alone."""
    if isinstance(value, float):
        return (float, value.hex())
    if isinstance(value, complex):
        return (complex, value.real.hex(), value.imag.hex())
    if isinstance(value, (*_PLAIN, *_TORCH)):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(map(literal_key, value)))
    if isinstance(value, functools.partial):  # Dynamo makes a new one each time it meets it
        bound = tuple((k, literal_key(v)) for k, v in sorted(value.keywords.items()))
        return (functools.partial, literal_key(value.func), literal_key(value.args), bound)
    if _is_value_of_torch(value):
        return (type(value), value)
    return ("object", id(value))


def _is_value_of_torch(value: Any) -> bool:
    """Check whether torch compares objects of a class by what they say: placements, meshes."""
    cls: Any = type(value)
    compared = cls.__eq__ is not object.__eq__ and cls.__hash__ not in (None, object.__hash__)
    return compared and cls.__module__.startswith("torch.") and not isinstance(value, _COMPUTED)
