"""The same computation of many tensors as a graph of its own, that runs on their stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from fxparam._torch.fx import copy_nodes, may_have_own_backward, op_name
from fxparam._torch.names import OpOverload, OpOverloadPacket, qualified_name
from fxparam._torch.vmap import CannotBatch, differentiates, fake_mode_of, trace_batched
from fxparam.graph.analysis.computations import Computation
from fxparam.graph.analysis.nodes import value_of

__all__ = ["vectorize"]


def vectorize(
    members: Sequence[Computation], first: Sequence[Node], seats: Sequence[Sequence[Node]]
) -> GraphModule:
    """Return a graph of plain ops that gives the results of all members, one member's first.

    Args:
        members: computations with equal keys.
        first: the inputs of the first member.
        seats: for each input, that of each member; a single one where all have the same.

    Returns:
        The graph, with an example value on each node.

    Raises:
        CannotBatch: an op cannot be run on a batch, or the results would be of another kind.
    """
    mode = fake_mode_of(value_of(first[0]))
    if mode is None or all(len(seat) == 1 for seat in seats):
        raise CannotBatch("its inputs have no fake tensors, or do not differ")
    function = Interpreter(_function(members[0], first)).run
    # An op of the batch is from where the first member's is.
    with mode, preserve_node_meta():
        fakes = [[_fresh(value_of(node)) for node in seat] for seat in seats]
        traced = trace_batched(function, fakes)
    with mode:
        _check(traced, members, seats)
    _check_backwards(traced, members[0])
    return traced


def _function(member: Computation, inputs: Sequence[Node]) -> GraphModule:
    """Return a computation by itself."""
    graph = Graph()
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    copy_nodes(member.nodes, graph, copies)
    graph.output([copies[node] for node in member.results])
    return GraphModule({}, graph)


def _fresh(value: Tensor) -> Tensor:
    """Return an input like another, with no past in autograd."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)


def _check(
    batch: GraphModule, members: Sequence[Computation], seats: Sequence[Sequence[Node]]
) -> None:
    """Check that a batch gives tensors of the same kinds, as differentiable as the members' are.

    Leaves an example value on each node, as Dynamo would.

    Raises:
        CannotBatch: it does not.
    """
    inputs = [value_of(node) for seat in seats for node in seat]
    results = _Propagation(batch).run(*inputs)
    wanted = [value_of(node) for each in members for node in each.results]
    if any(_kind(a) != _kind(b) for a, b in zip(results, wanted, strict=True)):
        raise CannotBatch("a value would have another dtype, or lie in memory in another way")
    if not differentiates(results, inputs):
        raise CannotBatch("an op of the batch has no derivative")


def _check_backwards(batch: GraphModule, member: Computation) -> None:
    """Check that what has a backward of its own is still called in the batch.

    A batching rule that makes other calls would be differentiated in its place.

    Raises:
        CannotBatch: it is not.
    """
    if not any(value_of(node).requires_grad for node in member.results):
        return
    # By their namespaces too: a rule of ``mine::mul`` may well call ``aten::mul``.
    called = {_called(node) for node in batch.graph.nodes}
    for node in member.nodes:
        if may_have_own_backward(node) and _called(node) not in called:
            raise CannotBatch(f"the batching rule of {op_name(node)} may have another backward")


def _called(node: Node) -> object:
    """Return the full name of the op that a node calls, or what else it calls."""
    is_op = isinstance(node.target, (OpOverload, OpOverloadPacket))
    return qualified_name(node.target) if is_op else node.target


class _Propagation(Interpreter):
    """Runs a graph on example values, and keeps what each node gives."""

    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
