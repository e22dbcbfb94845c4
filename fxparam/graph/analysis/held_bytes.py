"""How much memory a run of a graph holds at its peak, read off the example values.

An estimate from the graph alone: backward needs what autograd tracks, hence such a value stays
until the end, and another one until its last reader has run. Inputs are the caller's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor
from torch.fx import Graph, Node

from fxparam._torch.tensors import storage_of
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["allowed_bytes", "held_bytes"]


def held_bytes(graph: Graph, without: Collection[Node] = ()) -> int:
    """Return the most bytes that values of a graph hold at once; zero for those of unknown size.

    Args:
        graph: one of Dynamo's.
        without: nodes whose values do not count.
    """
    size: dict[object, int] = {}
    last: dict[object, int] = {}
    born: dict[object, int] = {}
    nodes = [node for node in graph.nodes if node not in without]
    for place, node in enumerate(nodes):
        for tensor in _tensors(node):
            key = storage_of(tensor)
            born.setdefault(key, place if node.op.startswith("call") else -1)
            size[key] = max(size.get(key, 0), tensor.numel() * tensor.element_size())
            last[key] = len(nodes) if tensor.requires_grad else max(last.get(key, 0), place)
        for read in node.all_input_nodes:
            for tensor in _tensors(read):
                key = storage_of(tensor)
                last[key] = max(last.get(key, 0), place)
    change = [0] * (len(nodes) + 2)
    for key, place in born.items():
        if place >= 0:
            change[place] += size[key]
            change[last[key] + 1] -= size[key]
    held = most = 0
    for each in change:
        held += each
        most = max(most, held)
    return most


def allowed_bytes(held: int, max_bytes: float) -> int:
    """Return what evaluations may hold while they work: half of what a graph holds, or 256 KiB.

    They run before the rest of the graph, and their backward after the rest's.

    Args:
        held: the bytes that the graph holds at its peak.
        max_bytes: a limit of the user's.
    """
    return int(min(max(held // 2, 1 << 18), max_bytes))


def _tensors(node: Node) -> Iterator[Tensor]:
    """Yield the tensors in a node's value that have a storage of a known size."""
    for tensor in tensors_in(value_of(node)):
        if storage_of(tensor) is not None and isinstance(tensor.numel(), int):
            yield tensor
