"""FX graphs: names and lives of nodes, and which argument a call writes, by torch's conventions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fxparam._torch.names import OpOverload, qualified_name

__all__ = [
    "IN_PLACE_OPERATORS",
    "copy_dynamo_graph",
    "is_erased",
    "is_named_in_place",
    "mark_as_added_input",
    "op_name",
    "rename",
    "unpickle_with",
    "written_argument",
]

_NAMES = ["add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift"]
_NAMES += ["sub", "truediv", "xor"]
#: The functions of in-place operators, by the names of their methods: ``__iadd__``.
IN_PLACE_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__i{name}__": getattr(operator, f"i{name}") for name in _NAMES
}


def rename(node: Node, name: str) -> None:
    """Give a node a name, with a number behind it if another node has it."""
    node._rename(name)


def unpickle_with(owner: GraphModule | Graph, tracer: Any) -> None:
    """Let ``tracer`` trace the code of a graph, or of a graph module, when it is unpickled.

    Tracing is how torch.fx makes a graph from a pickle, which holds code alone.
    """
    owner._tracer_cls = tracer


def is_erased(node: Node) -> bool:
    """Check whether a node was taken out of its graph."""
    return node._erased


def op_name(node: Node) -> str:
    """Return the name of what a node calls, without namespace and overload: ``add_``."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return qualified_name(target).partition("::")[2]
    return str(getattr(target, "__name__", target))


def is_named_in_place(name: str) -> bool:
    """Check torch's convention: the name of what changes a tensor in place ends in one underscore.

    ``torch.fx``'s and Dynamo's own tests of this miss operators (``operator.iadd``) and ``out=``:
    for those there is :func:`written_argument`.
    """
    return len(name) > 1 and name.endswith("_") and not name.endswith("__")


def written_argument(node: Node) -> Node | None:
    """Return the argument that a call writes in place and returns, by torch's conventions."""
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    name = op_name(node)
    writes = (
        is_named_in_place(name)
        or name in IN_PLACE_OPERATORS
        or node.target in IN_PLACE_OPERATORS.values()
        or node.target is operator.setitem
        or name == "__setitem__"
        or node.kwargs.get("inplace") is True
    )
    first = node.args[0] if writes and node.args else None
    return first if isinstance(first, Node) else None


def copy_dynamo_graph(gm: GraphModule) -> GraphModule:
    """Copy a graph of Dynamo's, with what AOTAutograd asks of one.

    AOTAutograd reads two private attributes of such a graph, which ``Graph.node_copy`` and
    ``GraphModule`` do not copy: the source of each input, and the sources of parameters by name.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copies[node]._dynamo_source = node._dynamo_source
    module = GraphModule(gm, graph)
    module.meta.update(gm.meta)
    module._param_name_to_source = gm._param_name_to_source
    return module


def mark_as_added_input(placeholder: Node) -> None:
    """Mark an input that we added to a Dynamo graph as one without a source.

    AOTAutograd asks each input for its source. DDPOptimizer marks the inputs that it adds so too.
    """
    placeholder._dynamo_source = None
