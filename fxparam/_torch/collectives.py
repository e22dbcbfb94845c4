"""Collectives: the ops of a graph that wait for other ranks, and the store that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.fx import op_name
from fxparam._torch.names import (
    OpOverload,
    OpOverloadPacket,
    lookup,
    qualified_name,
    tree_flatten,
)
from fxparam._torch.tensors import is_wrapper_subclass

__all__ = ["collectives_of", "exchanges_of", "gives_what_ranks_have", "ranks", "store_of_ranks"]


def collectives_of(gm: GraphModule) -> list[str]:
    """Return the names of the ops of a graph and of its bodies that may wait for other ranks.

    An op on a ``DTensor`` may: redistributions do, and products of sharded matrices.
    """
    bodies = (module for module in gm.modules() if isinstance(module, GraphModule))
    return [op_name(node) for body in bodies for node in _waiting(body)]


def _waiting(gm: GraphModule) -> Iterator[Node]:
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and (
            _is_collective(node.target) or any(map(_is_distributed, (node, *node.all_input_nodes)))
        ):
            yield node


def _is_collective(target: object) -> bool:
    is_op = isinstance(target, (OpOverload, OpOverloadPacket))
    return is_op and "c10d" in qualified_name(target).partition("::")[0]


def _is_distributed(node: Node) -> bool:
    """Check whether a node's value holds a tensor that is spread over ranks."""
    value = node.meta.get("example_value")
    return any(
        isinstance(leaf, torch.Tensor)
        and is_wrapper_subclass(leaf)
        and type(leaf).__module__.startswith("torch.distributed.")
        for leaf in tree_flatten(value)[0]
    )


def exchanges_of(
    gm: GraphModule, first: Callable[[Node], bool]
) -> dict[tuple[int, ...], list[str]]:
    """For each group of ranks, return the ops of a graph, in order, that certainly exchange data.

    Args:
        gm: the graph.
        first: chooses the nodes that run in front of the others.
    """
    found: dict[tuple[int, ...], list[str]] = {}
    bodies = (module for module in gm.modules() if isinstance(module, GraphModule))
    nodes = [node for body in bodies for node in body.graph.nodes]
    for node in sorted(nodes, key=lambda node: not first(node)):
        group = _group_of(node)
        if group:
            found.setdefault(group, []).append(op_name(node))
    return found


def _group_of(node: Node) -> tuple[int, ...]:
    """Return the ranks with which a node is known to exchange data; none if with no others."""
    if node.op not in ("call_function", "call_method"):
        return ()
    if op_name(node) in ("redistribute", "full_tensor"):
        values = (n.meta.get("example_value") for n in node.all_input_nodes)
        mesh = getattr(next(values, None), "device_mesh", None)
        return () if mesh is None else tuple(mesh.mesh.flatten().tolist())
    if not _is_collective(node.target) or op_name(node) == "wait_tensor":
        return ()
    names = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)]
    resolve = lookup("torch.distributed.distributed_c10d", "_resolve_process_group")
    try:
        group = resolve(names[-1])
    except (IndexError, LookupError, RuntimeError, ValueError):
        return ()
    return tuple(torch.distributed.get_process_group_ranks(group))


def gives_what_ranks_have(node: Node) -> bool:
    """Check whether a node ends a collective: it waits for one, or makes a ``DTensor`` local."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    if name in ("wait_tensor", "redistribute", "to_local", "full_tensor"):
        return True
    if name == "getitem" and isinstance(node.args[0], Node):
        # Before torch 2.13 Dynamo puts the wait into a function of autograd.
        return op_name(node.args[0]) == "autograd_function_apply"
    return _is_distributed(node) or any(map(_is_distributed, node.all_input_nodes))


def ranks() -> tuple[int, int]:
    """Return this rank, and how many there are; ``(0, 1)`` without a process group.

    In a fake one, as tests have it, this process is alone, and its store has nothing.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    if distributed.get_backend() == "fake":
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def store_of_ranks() -> Any:
    """Return the ``torch.distributed.Store`` of the default process group."""
    return lookup("torch.distributed.distributed_c10d", "_get_default_store")()
