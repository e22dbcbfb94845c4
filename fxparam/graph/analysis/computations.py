"""Connected parameter-derived nodes as functions: of which tensors, to which results.

An evaluation of a parametrized tensor is one, and so are the nodes around any other computed
weight. Those of equal keys compute the same function, of tensors of the same shapes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxparam._torch.names import HigherOrderOperator
from fxparam._torch.tensors import is_wrapper_subclass
from fxparam.graph.analysis.derived import Derived
from fxparam.graph.analysis.nodes import is_view, owner, value_of
from fxparam.graph.analysis.numbering import key_of

__all__ = ["Computation", "computations", "key_of_computation"]


@dataclass(frozen=True, eq=False)
class Computation:
    """Attributes:
    nodes: the calls, in order.
    inputs: what they read and is not among them, in the order it is read.
    results: those of the nodes that others read.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    results: tuple[Node, ...]


def computations(gm: GraphModule, derived: Derived) -> list[Computation]:
    """Return what a graph computes from parameters: its evaluations, and other connected nodes.

    A constant that several of them read is an input of each. Without those that do no more than
    show an input's memory, or that are not functions from plain tensors to plain tensors.
    """
    parts: dict[Hashable, list[Node]] = {}
    together = _Together()
    for node in gm.graph.nodes:
        if node in derived.candidates and node not in derived.constants:
            parts.setdefault(together.part_of(node, derived), []).append(node)
    joined: dict[Hashable, list[Node]] = {}
    for part, nodes in parts.items():
        joined.setdefault(together.find(part), []).extend(nodes)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    made = (_computation(nodes, derived, order) for nodes in joined.values())
    return [each for each in made if _is_function(each)]


class _Together:
    """Which nodes belong together: those of one evaluation, and connected ones without a list."""

    def __init__(self) -> None:
        self._parts: dict[Node, Hashable] = {}
        self._parents: dict[Hashable, Hashable] = {}

    def find(self, part: Hashable) -> Hashable:
        while part in self._parents:
            part = self._parents[part]
        return part

    def part_of(self, node: Node, derived: Derived) -> Hashable:
        """Return a node's part, after the parts that it connects were joined."""
        own = owner(node)
        if own is not None:
            return own
        found = {self.find(self._parts[n]) for n in node.all_input_nodes if n in self._parts}
        part = self._parts[node] = next(iter(sorted(found, key=str)), node)
        self._parents.update((other, part) for other in found if other is not part)
        return part


def _computation(nodes: list[Node], derived: Derived, order: dict[Node, int]) -> Computation:
    """Return a computation of some nodes, with the constants that nobody else reads."""
    inside = set(nodes)
    work = list(nodes)
    while work:
        for node in work.pop().all_input_nodes:
            own = node in derived.constants and inside.issuperset(node.users)
            if own and node not in inside and node.op.startswith("call"):
                inside.add(node)
                work.append(node)
    ordered = tuple(sorted(inside, key=order.__getitem__))
    inputs = dict.fromkeys(n for node in ordered for n in node.all_input_nodes if n not in inside)
    results = tuple(n for n in ordered if any(user not in inside for user in n.users))
    return Computation(ordered, tuple(inputs), results)


def _is_function(found: Computation) -> bool:
    """Check whether a computation is a function of plain tensors, and more than a view."""
    if not found.inputs or not found.results or all(map(is_view, found.nodes)):
        return False
    if any(isinstance(node.target, HigherOrderOperator) for node in found.nodes):
        return False
    return all(_is_plain(node) for node in (*found.inputs, *found.results))


def _is_plain(node: Node) -> bool:
    """Check whether a node's value is one tensor of a known size, with strides."""
    value = value_of(node)
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not is_wrapper_subclass(value)
        and all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    )


def key_of_computation(gm: GraphModule, found: Computation) -> Hashable:
    """Return a key of what is computed: equal ops, literals, structure, and kinds of inputs."""
    number: dict[Node, Hashable] = {node: ("input", i) for i, node in enumerate(found.inputs)}
    for i, node in enumerate(found.nodes):
        number[node] = i
    ops = tuple(key_of(gm, node, number) for node in found.nodes)
    results = tuple(number[node] for node in found.results)
    return ops, tuple(_kinds(found)), results


def _kinds(found: Computation) -> Iterator[Hashable]:
    for node in found.inputs:
        value = value_of(node)
        yield tuple(value.shape), value.dtype, value.device, value.requires_grad
