"""Gradients of values that one compiled graph has made, where not all of them have one.

Autograd sees one node for the whole graph. If a gradient comes to some of the values alone, the
node takes zeros for the others, and their originals would get gradients of zeros, or NaN where a
derivative is infinite. Evaluated one by one they get none. A hook on the node sees to that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

__all__ = ["keep_gradients_apart"]


def keep_gradients_apart(values: Sequence[Tensor], reads: Sequence[Sequence[Tensor]]) -> None:
    """Let an original have a gradient only if a value that is computed from it has one.

    Args:
        values: what one call of a compiled graph has given, or a part of it.
        reads: the tensors that each value is computed from.
    """
    if not any(value.requires_grad for value in values):
        return
    made: dict[Any, list[tuple[int, Sequence[Tensor]]]] = {}
    origins: set[object] = {
        get_gradient_edge(t).node for read in reads for t in read if t.requires_grad
    }
    for value, read in zip(values, reads, strict=True):
        if value.requires_grad:
            node, output = _compiled_node(value, origins)
            made.setdefault(node, []).append((output, read))
    for node, outputs in made.items():
        if isinstance(node, BackwardCFunction) and node not in origins:
            # The hook must not hold the node, which holds the hook.
            node.register_hook(partial(_drop, node.next_functions, outputs))


def _compiled_node(value: Tensor, origins: Collection[object]) -> tuple[Any, int]:
    """Return the node that made a value, and which of its outputs the value is, or is a view of.

    Args:
        value: it.
        origins: the nodes of what is read. A value that is a view of that has no node of its own.
    """
    node: Any
    node, output = get_gradient_edge(value)[:2]
    while node not in origins and not isinstance(node, BackwardCFunction):
        if len(node.next_functions) != 1 or node.next_functions[0][0] is None:
            break
        node, output = node.next_functions[0]
    return node, output


def _drop(
    reads: Sequence[tuple[Any, int]],
    outputs: Sequence[tuple[int, Sequence[Tensor]]],
    gradients: tuple[Tensor | None, ...],
    arrived: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of what a node has read, without those of values that have none.

    Args:
        reads: where each gradient goes.
        outputs: which output of the node each value is, and the tensors that it is computed from.
        gradients: those of what the node has read.
        arrived: those of its outputs.
    """
    if all(arrived[output] is not None for output, _ in outputs):
        return None
    wanted = {
        get_gradient_edge(tensor)[:2]
        for output, read in outputs
        if arrived[output] is not None
        for tensor in read
        if tensor.requires_grad
    }
    return tuple(g if edge in wanted else None for g, edge in zip(gradients, reads, strict=True))
