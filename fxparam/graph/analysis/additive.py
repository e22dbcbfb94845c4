"""Is the backward of a custom ``autograd.Function`` additive in the gradient it is given?

One shared value has one backward, for the sum of its users' gradients. That is the sum of their
backwards for every derivative, and for anything else that is additive: ``f(a + b) = f(a) + f(b)``.
A custom backward may be something else: it may clip or normalise the gradient, or add to it. Then
each access needs its own.

The graph of the backward is looked at, with a list of operations that are additive. What is not on
the list is taken not to be; custom ops are taken to be, as they are believed in what they declare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.dynamo import is_opaque_wrapper
from fxparam._torch.fx import op_name
from fxparam._torch.names import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    qualified_name,
    tree_flatten,
)
from fxparam.graph.analysis.nodes import body_of, tensors_in, value_of

__all__ = ["is_backward_additive"]

# Additive in their first argument, whatever the others, which do not depend on the gradient.
_UNARY = {
    *("neg", "getitem", "clone", "contiguous", "detach", "positive", "conj", "real", "imag"),
    *("view", "reshape", "flatten", "unflatten", "expand", "expand_as", "view_as", "reshape_as"),
    *("transpose", "permute", "t", "movedim", "swapaxes", "squeeze", "unsqueeze", "flip", "roll"),
    *("mT", "mH", "T", "H"),
    *("narrow", "select", "slice", "chunk", "split", "unbind", "diagonal", "diag_embed", "diag"),
    *("sum", "mean", "cumsum", "sum_to_size", "tril", "triu", "repeat", "index_select"),
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "_to_copy"),
    *("truediv", "div", "true_divide"),
}
_ATTRIBUTES = {"mT", "T", "H", "mH", "real", "imag"}
# Additive in each of two arguments, if only one depends on the gradient.
_BILINEAR = {"mul", "multiply", "matmul", "mm", "bmm", "mv", "dot", "linear", "einsum", "outer"}
_SUMS = {"add", "sub", "subtract", "cat", "stack"}
_FACTS = {"size", "dim", "stride", "numel", "shape", "dtype", "device", "ndim", "is_complex"}
_ZEROS = {"zeros_like", "zeros", "new_zeros"}


def is_backward_additive(node: Node) -> bool:
    """Check whether the backward of what a node computes is additive, as far as it is custom."""
    if not isinstance(node.target, HigherOrderOperator):
        return not is_opaque_wrapper(node.target)
    gm: Any = node.graph.owning_module
    bodies = [b for b in (body_of(gm, a) for a in node.all_input_nodes) if b is not None]
    if node.target.__name__ != "autograd_function_apply":
        return all(is_backward_additive(n) for body in bodies for n in body.graph.nodes)
    return len(bodies) == 2 and _is_additive(bodies[1], _gradients(*bodies))


def _gradients(forward: GraphModule, backward: GraphModule) -> set[Node]:
    """Return the inputs of a backward that are gradients: one for each output of the forward."""
    (output,) = forward.graph.find_nodes(op="output")
    results: Any = output.args[0]
    return set(backward.graph.find_nodes(op="placeholder")[: len(results[0])])


def _is_additive(body: GraphModule, gradients: set[Node]) -> bool:
    depends, zeros = set(gradients), set[Node]()
    for node in body.graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        name = op_name(node)
        on = [a for a in node.all_input_nodes if a in depends]
        if name in _ZEROS:
            zeros.add(node)
        if _may_write(node, name) and any(a in depends or a in zeros for a in node.all_input_nodes):
            return False
        if not on or name in _ZEROS or _is_fact(node, name):
            continue
        if not _is_additive_step(node, name, on, depends, zeros):
            return False
        depends.add(node)
    (output,) = body.graph.find_nodes(op="output")
    returned = [n for n in output.all_input_nodes if n not in depends]
    return all(n in zeros for n in returned)


def _is_additive_step(
    node: Node, name: str, on: list[Node], depends: set[Node], zeros: set[Node]
) -> bool:
    if _is_custom(node):
        return True  # believed
    if not _is_continuous(node) or _is_narrower(node, on):
        return False
    tensors = node.all_input_nodes
    if name == "getattr":
        return node.args[1] in _ATTRIBUTES
    if name in _UNARY:
        alone = node.args[:1] == (on[0],) and _occurrences(node, on[0]) == len(on) == 1
        return alone and "rounding_mode" not in node.kwargs
    if name in _BILINEAR:
        return len(on) == 1 and len(tensors) <= 2 and _occurrences(node, on[0]) == 1
    if name in _SUMS:
        terms = tree_flatten((node.args, node.kwargs))[0]
        plain = name in ("cat", "stack") or all(isinstance(t, Node) for t in terms)
        return plain and all(t in depends or t in zeros for t in tensors)
    if name in ("where", "masked_fill"):
        condition, branches = _branches(node, name)
        return condition not in depends and all(
            b in depends or b in zeros if isinstance(b, Node) else b == 0 for b in branches
        )
    return False


def _is_continuous(node: Node) -> bool:
    """Check whether every tensor in the value has a dtype that a gradient may have."""
    tensors = tensors_in(value_of(node))
    return bool(tensors) and all(t.is_floating_point() or t.is_complex() for t in tensors)


def _is_narrower(node: Node, on: list[Node]) -> bool:
    """Check whether the value has fewer bits than its inputs, hence is rounded: not additive."""
    of = [torch.finfo(t.dtype) for n in on for t in tensors_in(value_of(n))]
    into = [torch.finfo(t.dtype) for t in tensors_in(value_of(node))]
    return not of or any(b.eps > a.eps or b.max < a.max for a in of for b in into)


def _may_write(node: Node, name: str) -> bool:
    return name == "setitem" or "out" in node.kwargs or name.endswith("_") and name[-2:] != "__"


def _branches(node: Node, name: str) -> tuple[Any, list[Any]]:
    args = list(node.args)
    if len(args) != 3:
        return None, [None]
    if name == "masked_fill":
        return args[1], [args[0], args[2]]
    # torch.where(condition, a, b), or a.where(condition, b)
    if node.op == "call_method":
        return args[1], [args[0], args[2]]
    return args[0], args[1:]


def _occurrences(node: Node, argument: Node) -> int:
    return sum(leaf is argument for leaf in tree_flatten((node.args, node.kwargs))[0])


def _is_fact(node: Node, name: str) -> bool:
    """Check whether a node asks for a shape or dtype, which no gradient's values change."""
    return name in _FACTS or (name == "getattr" and node.args[1] in _FACTS)


def _is_custom(node: Node) -> bool:
    target: Any = node.target
    if not isinstance(target, (OpOverload, OpOverloadPacket)):
        return False
    namespace = qualified_name(target).partition("::")[0]
    return namespace not in ("aten", "prims", "prim", "_c10d_functional")
