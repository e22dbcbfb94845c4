"""What a rewrite of an op is, and what it may ask of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxparam._torch.tensors import is_wrapper_subclass
from fxparam.graph.analysis.nodes import value_of

__all__ = ["Arguments", "Call", "Rewrite"]

#: The arguments of a call, by name: nodes and literals.
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call that may be rewritten.

    Attributes:
        node: the call.
        arguments: by their names in the rewrite.
        autocast: whether autocast may be on.
    """

    node: Node
    arguments: Arguments
    autocast: bool

    def tensor(self, name: str) -> Tensor | None:
        """Return the example value of an argument; None unless it is a plain tensor of known sizes.

        Of other tensors (subclasses such as ``DTensor``, sparse ones) only torch knows the op.
        """
        given = self.arguments.get(name)
        value = value_of(given) if isinstance(given, Node) else None
        if not isinstance(value, Tensor) or is_wrapper_subclass(value):
            return None
        plain = value.layout is torch.strided and all(type(size) is int for size in value.shape)
        return value if plain else None


@dataclass(frozen=True)
class Rewrite:
    """A rewrite of an op to another form: the same function and derivative up to rounding.

    Attributes:
        name: the op, as the report names it.
        targets: functions, and names of methods, that call it.
        parameters: the names of its arguments, in order; a call with others is left alone.
        is_right: whether the form may take the place of a call.
        form: a function of the same arguments, in order, whose calls of torch take its place.
        gains: where it is cheaper.
        bounded: whether the form also takes the bytes that it may hold while it works.
    """

    name: str
    targets: frozenset[object]
    parameters: tuple[str, ...]
    is_right: Callable[[Call], bool]
    form: Callable[..., Tensor]
    gains: Literal["backward", "forward and backward"] = "backward"
    bounded: bool = False

    def arguments(self, node: Node) -> Arguments | None:
        """Return the arguments of a call of the op by name; None for a call of another kind."""
        if node.op not in ("call_function", "call_method") or node.target not in self.targets:
            return None
        if len(node.args) > len(self.parameters):
            return None
        given = dict(zip(self.parameters, node.args, strict=False))
        # The first argument has several names: input, A, self.
        rest = {
            k if k in self.parameters else self.parameters[0]: v for k, v in node.kwargs.items()
        }
        named = {**given, **rest}
        whole = len(named) == len(node.args) + len(node.kwargs) == len(self.parameters)
        return named if whole and "out" not in node.kwargs else None
