"""Backward computes again what is not the same the second time.

The partitioner of AOTAutograd decides what forward saves for backward, and what backward computes
again. Three kinds of values differ when they are computed again:

- What is read from an input that the graph overwrites::

      y = torch.sin(weight * torch.cos(self.scale))   # backward needs the cosine again
      self.scale.mul_(2)                              # the last operation of the forward graph

  The gradient is wrong, without an error. Spectral norm reads and overwrites a vector of its power
  iteration. For a layer with 2, 3 or 4 inputs its gradient is off by up to 0.3 % under Inductor.
- What is drawn at random. Under a memory budget (``activation_memory_budget``) the draw itself may
  be computed again, and backward has another mask than forward.
- What an evaluation reads from a buffer that other code writes between forward and backward, such
  as a second spectral norm step. Eager code has saved what it needs. Compiled code raises ``one of
  the variables needed for gradient computation has been modified``.

Seen on 2.11.0, 2.13.0 and 2.15.0, with ``inductor`` and ``aot_eager``. An open pull request mends
the first and, behind a setting, the third: https://github.com/pytorch/pytorch/pull/197039.
``tests/graph/torch_bugs/test_recomputed_values.py`` shows all three.

What we do: such values are saved, by a pass over the joint graph of forward and backward. Buffers
that are read outside of evaluations, and originals, are left as they are: to save what is read from
them costs memory in every model. Under a memory budget the partitioner knows two exceptions from
what has to be saved. With a budget of 0 it saves nothing, hence that is raised to nearly 0. And it
cannot save an operation that has several results (``native_dropout``, ``native_batch_norm``),
hence a graph where one has to be saved gets the whole budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from fxparam._torch.names import OpOverload, functorch_config
from fxparam.graph.analysis.nodes import is_view, owner, value_of

__all__ = ["mark_for_partitioner", "save_what_may_change", "saving_what_may_change"]

#: The smallest budget with which the partitioner saves what has to be saved.
_NEARLY_NOTHING = 1e-9


def saving_what_may_change(*, by_inductor: bool) -> AbstractContextManager[Any]:
    """Return a context to compile in, in which backward computes nothing again that may differ.

    Args:
        by_inductor: Inductor has :func:`mark_for_partitioner` as a pass of its own, so that its
            cache knows of it. Any other backend that uses AOTAutograd gets it by the setting
            ``joint_custom_pass``.
    """
    config = functorch_config()
    budget = max(config.activation_memory_budget, _NEARLY_NOTHING)
    changes: dict[str, Any] = {"activation_memory_budget": budget}
    if not by_inductor:
        changes["joint_custom_pass"] = _after(config.joint_custom_pass)
    patched: AbstractContextManager[Any] = config.patch(changes)
    return patched


def mark_for_partitioner(graph: Graph) -> None:
    """Mark what forward must save, while :func:`saving_what_may_change` is in force."""
    if save_what_may_change(graph):
        functorch_config().activation_memory_budget = 1  # until the context ends


def _after(users_pass: Callable[..., GraphModule] | None) -> Callable[..., GraphModule]:
    """Return AOTAutograd's joint pass that runs the user's and then this one."""

    def joint_pass(gm: GraphModule, inputs: Any) -> GraphModule:
        gm = users_pass(gm, inputs) if users_pass is not None else gm
        mark_for_partitioner(gm.graph)
        return gm

    return joint_pass


def save_what_may_change(graph: Graph) -> bool:
    """Mark what forward must save, in a joint graph of forward and backward.

    Args:
        graph: an ATen graph as AOTAutograd hands it to the partitioner. Metadata change, and copies
            are made by an operation that Inductor does not drop.

    Returns:
        Whether an operation with several results must be saved. Under a memory budget below 1 the
        partitioner then fails.
    """
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    overwritten = {node.args[0] for node in copies}
    saved: list[Node] = []
    for node in graph.nodes:
        if node.op == "placeholder" and (node in overwritten or _is_buffer_of_evaluation(node)):
            saved += _reads(node)
        elif _draws(node) and "recompute" not in node.meta:
            saved.append(node)  # in a checkpoint it has a policy, and its random state is restored
    for node in saved:
        _save(node)
    return any(isinstance(value_of(node), tuple) for node in saved)


def _save(node: Node) -> None:
    if node.target is torch.ops.aten.clone.default:
        node = _for_good(node)
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    if isinstance(value_of(node), tuple):  # its results are what can be saved, also in a checkpoint
        for result in node.users:
            result.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _for_good(clone: Node) -> Node:
    """Return the node of a copy that Inductor does not drop, in place of one that it may drop.

    It drops a copy of an input that has the strides of the input, and backward would read the
    input. ``lift_fresh_copy`` makes a contiguous one, hence of the dimensions in their order in
    memory.
    """
    source = clone.all_input_nodes[0]
    strides = value_of(source).stride()
    if value_of(clone).stride() != strides:
        return clone
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    aten = torch.ops.aten
    if order == sorted(order):
        clone.target, clone.kwargs = aten.lift_fresh_copy.default, {}
        return clone
    back = [order.index(dim) for dim in range(len(order))]
    copied = source
    with clone.graph.inserting_before(clone):
        for target, args in ((aten.permute.default, (order,)), (aten.lift_fresh_copy.default, ())):
            copied = clone.graph.call_function(target, (copied, *args))
            copied.meta = {**clone.meta, "val": value_of(clone).permute(order)}
    clone.target, clone.args, clone.kwargs = aten.permute.default, (copied, back), {}
    return copied


def _is_buffer_of_evaluation(node: Node) -> bool:
    """Check whether an input gets no gradient and is read by an evaluation."""
    described = node.meta.get("tensor_meta")
    if getattr(described, "requires_grad", True):
        return False
    return any(owner(read) is not None for read in _reads(node))


def _draws(node: Node) -> bool:
    """Check whether a node draws random numbers."""
    if not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags


def _reads(source: Node) -> Iterator[Node]:
    """Yield what reads an input, or a view of it; not the views.

    To save a view would be to save the memory that is overwritten.
    """
    work, seen = [source], {source}
    while work:
        for user in work.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if is_view(user):
                work.append(user)
            elif user.target is not torch.ops.aten.copy_.default:
                yield user
