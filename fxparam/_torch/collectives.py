"""Collectives: the ops of a graph that wait for other ranks, and the store that all ranks share."""

from __future__ import annotations

from collections.abc import Iterator
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

__all__ = ["collectives_of", "ranks", "store_of_ranks"]


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


def ranks() -> tuple[int, int]:
    """Return this rank, and how many there are; ``(0, 1)`` without a process group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def store_of_ranks() -> Any:
    """Return the ``torch.distributed.Store`` of the default process group."""
    return lookup("torch.distributed.distributed_c10d", "_get_default_store")()
