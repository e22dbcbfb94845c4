"""FX graphs: copy and rename nodes, copy Dynamo's graphs, find which argument a call writes."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from fxparam._torch.names import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    qualified_name,
)

__all__ = [
    "IN_PLACE_OPERATORS",
    "copy_dynamo_graph",
    "copy_nodes",
    "hold",
    "is_erased",
    "is_named_in_place",
    "is_torch",
    "mark_as_added_input",
    "may_write_unseen",
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
# Modules of torch whose functions do more than compute tensors.
_HIDING = tuple(
    f"torch.{name}"
    for name in (
        "autograd",
        "_C._autograd",
        "_C._functorch",
        "_functorch",
        "distributed",
        "_dynamo",
    )
)


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


def may_have_own_backward(node: Node) -> bool:
    """Check whether a call may be of what users registered a backward for, or of their own code."""
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return qualified_name(target).partition("::")[0] not in ("aten", "prims", "prim")
    return node.op == "call_function" and not is_torch(node)


def is_torch(node: Node) -> bool:
    """Check whether the target is torch's or Python's own: safe to run again on fakes."""
    target = node.target
    if node.op == "call_method":
        return hasattr(torch.Tensor, str(target)) or _is_method_of_torchs_tensor(node)
    if node.op != "call_function":
        return False
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return True
    if isinstance(target, HigherOrderOperator):
        return True
    module = getattr(target, "__module__", None)
    if module is None:  # torch.matrix_exp and its like: methods of a type of torch._C
        owner = getattr(target, "__self__", None)
        module = getattr(owner, "__module__", None) or getattr(owner, "__name__", None) or ""
    if module == "builtins":
        return target is getattr or isinstance(target, type)
    return (
        module.split(".")[0] in ("torch", "_operator", "operator", "math")
        and isinstance(
            target, (types.BuiltinFunctionType, types.FunctionType, types.BuiltinMethodType)
        )
        or _is_operator(target)
    )


def _is_method_of_torchs_tensor(node: Node) -> bool:
    """Check whether a method is one of a class of torch's that wraps tensors, as ``DTensor``."""
    receiver = node.args[0] if node.args else None
    meta = receiver.meta if isinstance(receiver, Node) else {}
    cls = type(meta.get("example_value"))
    own = issubclass(cls, torch.Tensor) and cls.__module__.startswith("torch.")
    return own and callable(getattr(cls, str(node.target), None))


def _is_operator(target: object) -> bool:
    return getattr(operator, getattr(target, "__name__", ""), None) is target


def may_write_unseen(node: Node) -> bool:
    """Check whether a node may write what neither its name nor the versions of tensors show.

    Bodies of higher-order ops, code that is not torch's, and functions of torch that make an alias
    with a version of its own (``x.data``) or call other code (autograd).
    """
    if node.op in ("placeholder", "get_attr"):
        return False
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return qualified_name(node.target).partition("::")[0] != "aten"
    module = str(getattr(node.target, "__module__", ""))
    higher_order = isinstance(node.target, HigherOrderOperator)
    return not is_torch(node) or higher_order or module.startswith(_HIDING)


def copy_nodes(
    nodes: Iterable[Node],
    graph: Graph,
    copies: dict[Node, Any],
    *,
    modules: tuple[GraphModule, GraphModule] | None = None,
) -> None:
    """Copy nodes into a graph, at its insertion point.

    Args:
        nodes: nodes of one graph, in order.
        graph: the graph that gets the copies.
        copies: what stands there for each node that is read; gets the copies. Nodes that are in it
            already are not copied.
        modules: the module whose attributes the nodes read, and the one that is to hold them for
            the copies; None if it is the same module.
    """
    for node in nodes:
        if node in copies:
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if modules is not None and node.op == "get_attr":
            source, target = modules
            name = str(node.target)
            copies[node].target = hold(target, name, operator.attrgetter(name)(source))


def hold(gm: GraphModule, name: str, value: Any) -> str:
    """Let a graph module hold a value that nodes of its graph read.

    Args:
        gm: the graph module.
        name: the name of the attribute; gets a number if the module holds something else there.
        value: a tensor, which becomes no part of the module's state dict, or a module.

    Returns:
        The name to read it under.
    """
    stem = name = name.replace(".", "_")
    number = 0
    while hasattr(gm, name):
        if getattr(gm, name) is value:
            return name
        number += 1
        name = f"{stem}_{number}"
    if isinstance(value, Tensor) and not isinstance(value, Parameter):
        gm.register_buffer(name, value, persistent=False)
    else:
        setattr(gm, name, value)
    return name


def copy_dynamo_graph(gm: GraphModule) -> GraphModule:
    """Copy a graph of Dynamo's, with what AOTAutograd asks of one.

    AOTAutograd reads two private attributes of such a graph, which ``Graph.node_copy`` and
    ``GraphModule`` do not copy: the source of each input, and the sources of parameters by name.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    copy_nodes(gm.graph.nodes, graph, copies)
    for node in gm.graph.find_nodes(op="placeholder"):
        copies[node]._dynamo_source = node._dynamo_source
    module = GraphModule(gm, graph)
    module.meta.update(gm.meta)
    module._param_name_to_source = gm._param_name_to_source
    return module


def mark_as_added_input(placeholder: Node, *, static: bool) -> None:
    """Mark an input that we added to a Dynamo graph as one without a source.

    AOTAutograd asks each input for its source. DDPOptimizer marks the inputs that it adds so too.

    Args:
        placeholder: the input.
        static: whether it is marked as ``torch._dynamo.mark_static_address(guard=False)`` marks a
            tensor, whose CUDA graph is recorded anew when its address has changed.
    """
    placeholder._dynamo_source = None
    if static:
        placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
