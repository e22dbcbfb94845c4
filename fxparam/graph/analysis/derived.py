"""Which nodes depend on parameters, buffers and constants alone, in a graph and in its bodies.

Those nodes, and the nodes of an evaluation whatever they depend on (``functional_call`` may put
any tensor in an original's place), are the candidates for sharing. Other repeated code is the
user's and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.dynamo import is_parameter_or_buffer
from fxparam.graph.analysis.nodes import owner, value_of

__all__ = ["PARAMETER", "Derived", "derive", "is_parameter"]

#: Key of a placeholder's metadata: the name of the parameter or buffer that export says it is.
PARAMETER = "fxparam.parameter"


@dataclass(frozen=True)
class Derived:
    """Attributes:
    nodes: parameter-derived nodes, the parameters among them.
    constants: nodes that depend on nothing.
    candidates: the calls that may be shared.
    """

    nodes: frozenset[Node]
    constants: frozenset[Node]
    candidates: frozenset[Node]


def is_parameter(node: Node) -> bool:
    """Check whether a placeholder of the outermost graph is a parameter or a buffer."""
    if PARAMETER in node.meta or is_parameter_or_buffer(node.meta):
        return True
    return isinstance(value_of(node), torch.nn.Parameter)


def derive(gm: GraphModule, inputs: Iterable[Node]) -> Derived:
    """Return the nodes that follow from the placeholders that are parameter-derived."""
    nodes = set(inputs)
    constants: set[Node] = set()
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            nodes.add(node)
        elif node.op in ("call_function", "call_method"):
            arguments = node.all_input_nodes
            if all(n in constants for n in arguments):
                constants.add(node)
                if owner(node) is not None:
                    found.add(node)
            elif all(n in constants or n in nodes for n in arguments):
                nodes.add(node)
                found.add(node)
            elif owner(node) is not None:
                found.add(node)
    return Derived(frozenset(nodes), frozenset(constants), frozenset(found))
