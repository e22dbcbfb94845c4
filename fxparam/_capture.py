"""Capture by Dynamo, as a graph over the model's own parameters and buffers.

It takes example inputs, and then traces what symbolic tracing cannot: branches on ranks and dtypes,
loops over shapes.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from fxparam._grad_mode import restore_grad_mode
from fxparam._private import (
    dynamo_export,
    rename,
    storage_identity,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)
from fxparam.graph.nodes import value_of

__all__ = ["capture"]


def capture(root: Any, example_inputs: Sequence[Any], tracer_cls: type) -> GraphModule:
    """A graph module of one call of ``root``, with its tensors read by their names in ``root``.

    Args:
        root: a module or function.
        example_inputs: positional arguments.
        tracer_cls: what traces the code of the graph module again, when it is unpickled.

    Raises:
        torch._dynamo.exc.Unsupported: the model cannot be captured as one graph.
    """
    args = _distinct(tuple(example_inputs))
    with _unchanged(root) as rebound:
        gm: GraphModule = dynamo_export(root, args)
    if rebound:
        with _unchanged(root):
            gm = dynamo_export(_returning(root, rebound), args)
    names = _names(root)
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if isinstance(value, torch.Tensor):
            node.target = names.get(id(value), node.target)
    gm.graph = _with_signature(gm, root, args, tracer_cls)
    if rebound:
        _write_rebound(gm.graph, rebound)
    restore_grad_mode(gm.graph, torch.is_grad_enabled())
    return gm


def _with_signature(gm: GraphModule, root: Any, args: tuple[Any, ...], tracer_cls: type) -> Graph:
    """The graph with a placeholder per argument and its value as written, in place of leaves."""
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
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            rename(copies[node], re.sub(r"\W", "_", str(node.target)))
    flat = next(reversed(gm.graph.nodes)).args[0]
    graph.output(
        tree_unflatten([copies[v] if isinstance(v, Node) else v for v in flat], gm._out_spec)
    )
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
    """What is found in an argument that is a container."""
    for key in path:
        if hasattr(key, "name"):
            node = graph.call_function(getattr, (node, key.name))
        else:
            index = key.idx if hasattr(key, "idx") else key.key
            node = graph.call_function(operator.getitem, (node, index))
    return node


def _distinct(args: Any) -> Any:
    """Dynamo takes two arguments that are one tensor for one argument, in later calls as well."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
        return leaf

    return tree_map(once, args)


@contextmanager
def _unchanged(root: Any) -> Iterator[list[str]]:
    """Put back the buffers that tracing rebinds; gives their names."""
    modules = dict(root.named_modules()) if isinstance(root, Module) else {}
    before = {path: dict(module._buffers) for path, module in modules.items()}
    rebound: list[str] = []
    try:
        yield rebound
    finally:
        for path, originals in before.items():
            buffers = modules[path]._buffers
            prefix = f"{path}." if path else ""
            rebound += [prefix + k for k, v in originals.items() if buffers.get(k) is not v]
            buffers.update(originals)


def _returning(root: Module, names: Sequence[str]) -> Callable[..., Any]:
    """A call that returns, after the model's outputs, what it leaves bound to buffers' names."""

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


def _write_rebound(graph: Graph, names: Sequence[str]) -> None:
    """Write what the graph returns for buffers to the buffers, and return the rest."""
    output = next(reversed(graph.nodes))
    outputs, values = output.args[0]
    output.args = (outputs,)
    for name, value in zip(names, values, strict=True):
        read = next(n for n in graph.find_nodes(op="get_attr") if n.target == name)
        if storage_identity(value_of(read))[1] == storage_identity(value_of(value))[1]:
            continue  # out=self.buffer
        with graph.inserting_before(output):
            new = graph.call_method("detach", (value,))
            graph.call_method("copy_", (read, new))


def _names(root: Module) -> dict[int, str]:
    """The qualified name of each parameter and buffer; the first of a tied one."""
    names: dict[int, str] = {}
    if not isinstance(root, Module):
        return names
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        names.setdefault(id(tensor), name)
    return names
