"""Capture by Dynamo, as a graph over the model's own parameters and buffers.

It takes example inputs, and then traces what symbolic tracing cannot: branches on ranks and dtypes,
loops over shapes.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from fxparam._torch.dynamo import dynamo_export, nest_results
from fxparam._torch.fx import copy_nodes, rename
from fxparam._torch.names import tree_flatten_with_path, tree_map
from fxparam.graph.analysis.nodes import meta_with, value_of
from fxparam.tracing.grad_mode import switch_grad_mode
from fxparam.tracing.proxies import keep_old_numbers
from fxparam.tracing.rebound import State, write_rebound

__all__ = ["capture"]


def capture(root: Any, example_inputs: Sequence[Any], tracer_cls: type) -> GraphModule:
    """Return one call of ``root`` as a graph module, which reads tensors by their names.

    Args:
        root: a module or function.
        example_inputs: positional arguments.
        tracer_cls: what traces the code of the graph module again, when it is unpickled.

    Raises:
        torch._dynamo.exc.Unsupported: the model cannot be captured as one graph.
    """
    args, state = _distinct(tuple(example_inputs), root), State(root)
    tensors, enabled = state.tensors, torch.is_grad_enabled()
    # Dynamo exports a module by its forward alone, and fails for one with hooks
    # (test_hooks_on_the_model_itself).
    hooked = isinstance(root, Module) and (root._forward_hooks or root._forward_pre_hooks)
    call = (lambda *args: root(*args)) if hooked else root
    gm, rebound = _export(call, args, state, enabled)
    if rebound:
        call = _returning(root, rebound)
        gm, _ = _export(call, args, state, enabled)
    # The graph of one mode does not tell what runs under a mode of the model's own from what runs
    # under its caller's (test_grad_modes_as_in_eager).
    try:
        opposite = _export(call, args, state, not enabled)[0]
    except Exception:  # the model may work in one mode alone
        opposite = None
    if opposite is not None and not enabled and _has_backward(opposite):
        gm, opposite, enabled = opposite, gm, True
    switch_grad_mode(gm.graph, None if opposite is None else opposite.graph, enabled)
    names = _names(root)
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if isinstance(value, torch.Tensor):
            node.target = names.get(id(value), node.target)
    gm.graph = _with_signature(gm, root, args, tracer_cls)
    if rebound:
        _write_rebound(gm.graph, rebound, tensors)
    keep_old_numbers(gm.graph)
    return gm


def _has_backward(gm: GraphModule) -> bool:
    """Check for a custom ``autograd.Function``, which Dynamo inlines under ``no_grad``.

    ``test_a_custom_backward_is_there_when_traced_without_gradients`` shows what would be lost.
    """
    bodies = (body for body in gm.modules() if isinstance(body, GraphModule))
    names = {getattr(n.target, "__name__", "") for body in bodies for n in body.graph.nodes}
    return "autograd_function_apply" in names


def _export(
    call: Any, args: tuple[Any, ...], state: State, grad_enabled: bool
) -> tuple[GraphModule, list[str]]:
    """Return a call as a graph, and the names of the buffers that it rebinds.

    The model is unchanged afterwards.
    """
    try:
        with torch.set_grad_enabled(grad_enabled):  # the call may leave another
            return dynamo_export(call, args), list(state.rebound())
    finally:
        state.restore()


def _with_signature(gm: GraphModule, root: Any, args: tuple[Any, ...], tracer_cls: type) -> Graph:
    """Return the graph with a placeholder per argument, whole, in place of its leaves."""
    forward = root.forward if isinstance(root, Module) else root
    bound = inspect.signature(forward).bind(*args)
    given = {f"{n}_{i}" if _is_variadic(forward, n) else n: a for n, i, a in _spread(bound)}
    graph = Graph(tracer_cls=tracer_cls)
    placeholders = [graph.placeholder(name) for name in given]
    copies: dict[Node, Node] = {}
    leaves = [
        (placeholder, path)
        for placeholder, value in zip(placeholders, given.values(), strict=True)
        for path, _ in tree_flatten_with_path(value)[0]
    ]
    for old, (placeholder, path) in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=True):
        if old.users:
            copies[old] = _part(graph, placeholder, path)
            copies[old].meta = dict(old.meta)
    inside = (node for node in gm.graph.nodes if node.op not in ("placeholder", "output"))
    copy_nodes(inside, graph, copies)
    for node in graph.find_nodes(op="get_attr"):
        rename(node, re.sub(r"\W", "_", str(node.target)))
    flat: Any = gm.graph.output_node().args[0]
    graph.output(nest_results(gm, [copies[v] if isinstance(v, Node) else v for v in flat]))
    return graph


def _spread(bound: inspect.BoundArguments) -> Iterator[tuple[str, int, Any]]:
    for name, value in bound.arguments.items():
        variadic = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        for i, each in enumerate(value if variadic else (value,)):
            yield name, i, each


def _is_variadic(function: Any, name: str) -> bool:
    kind = inspect.signature(function).parameters[name].kind
    return kind is inspect.Parameter.VAR_POSITIONAL


def _part(graph: Graph, node: Node, path: Sequence[Any]) -> Node:
    """Return the node of a leaf of an argument that is a container.

    Args:
        graph: the graph, to which the nodes that take containers apart are added.
        node: the argument.
        path: the keys that lead to the leaf.
    """
    for key in path:
        if hasattr(key, "name"):
            node = graph.call_function(getattr, (node, key.name))
        else:
            index = key.idx if hasattr(key, "idx") else key.key
            node = graph.call_function(operator.getitem, (node, index))
    return node


def _distinct(args: Any, root: Any) -> Any:
    """Return arguments of which none is another one, or a tensor of the model, by identity.

    Copies take the place of such. Dynamo would read one input for both, in the graph and thus in
    later calls as well (``test_an_example_input_that_is_a_tensor_of_the_model``).
    """
    seen = {id(tensor) for tensor in _tensors_of(root)}

    def once(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
        return leaf

    return tree_map(once, args)


def _tensors_of(root: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a model, or those that a function reads and the models it calls hold."""
    held: list[Any] = [root]
    if inspect.isfunction(root):
        read = inspect.getclosurevars(root)
        held = [*read.nonlocals.values(), *read.globals.values()]
    for value in held:
        state = State(value)
        yield from (*state.tensors.values(), *state.plain_tensors)
        if isinstance(value, torch.Tensor):
            yield value


def _returning(root: Module, names: Sequence[str]) -> Callable[..., Any]:
    """Return a function that calls the model, and returns its outputs and the values of buffers.

    Args:
        root: the model.
        names: the names of the buffers.
    """

    def call(*args: Any) -> Any:
        outputs = root(*args)
        values = []
        for name in names:
            value: Any = root
            for part in name.split("."):
                value = getattr(value, part)
            values.append(value)
        return outputs, values

    return call


def _write_rebound(graph: Graph, names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what the graph returns for buffers to the buffers, and return the rest."""
    output: Any = graph.output_node()
    outputs, values = output.args[0]
    output.args = (outputs,)
    write_rebound(graph, tensors, dict(zip(names, values, strict=True)), _describe_copy)


def _describe_copy(node: Node) -> None:
    """Give a copy of a read the metadata of that; none if the captured code does not read it."""
    for read in node.all_input_nodes:
        if value_of(read) is not None:
            node.meta = meta_with(read, value_of(read).clone())


def _names(root: Module) -> dict[int, str]:
    """Return the qualified name of each parameter and buffer; the first of a tied one."""
    names: dict[int, str] = {}
    if not isinstance(root, Module):
        return names
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        names.setdefault(id(tensor), name)
    return names
