"""``cond`` refuses branches that give an operand gradients with different strides.

    cond(p, lambda h: h * w, lambda h: h * w.mT, (h,))      raises in backward

torch 2.11 to 2.15 compare the strides of the gradients of two branches and raise where they differ.
The backward of a view of a flat view lays a gradient out anew, and views cost nothing: each operand
is read through such views in every branch, so that all its gradients have the operand's strides.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.nesting import Level
from fxparam.graph.analysis.nodes import meta_with, value_of

__all__ = ["lay_gradients_out_alike", "with_gradient_laid_out_alike"]

_LAID_OUT = "fxparam.laid_out"


def with_gradient_laid_out_alike(operand: Node) -> Node:
    """Return the operand of a branch, seen so that its gradient has the operand's strides in every
    branch.

    An operand that is not dense, or of a size that is not known, is left as it is.
    """
    value = value_of(operand)
    sizes = tuple(value.shape)
    if not value.requires_grad or not all(isinstance(size, int) for size in sizes):
        return operand
    order = sorted(range(value.dim()), key=lambda i: (-value.stride(i), i))
    if not value.permute(order).is_contiguous():
        return operand
    back = tuple(order.index(i) for i in range(len(order)))
    seen, last = operand, operand.graph.find_nodes(op="placeholder")[-1]
    for method, argument in (
        ("permute", tuple(order)),
        ("reshape", (-1,)),
        ("reshape", tuple(sizes[i] for i in order)),
        ("permute", back),
    ):
        if method == "permute" and argument == tuple(range(len(argument))):
            continue
        value = getattr(value, method)(argument)
        with operand.graph.inserting_after(last):
            seen = last = operand.graph.call_method(method, (seen, argument))
        seen.meta = {**meta_with(operand, value), _LAID_OUT: True}
    return seen


def lay_gradients_out_alike(levels: list[Level], changed: set[GraphModule]) -> None:
    """Where a branch was changed, let every operand's gradient have one layout in all branches.

    What repeats in a branch and is shared there sums its gradients in another order, and the sum
    has the strides of its first term.
    """
    calls = [c.current for level in levels for c in level.live if c.call.branches]
    bodies = {
        body.module: body.placeholders
        for call in calls
        if not changed.isdisjoint(body.module for body in call.bodies)
        for body in call.bodies
    }
    for module, placeholders in bodies.items():
        for operand in placeholders:
            readers = [user for user in operand.users if _LAID_OUT not in user.meta]
            if readers and isinstance(value_of(operand), torch.Tensor):
                seen = with_gradient_laid_out_alike(operand)
                for user in readers:
                    user.replace_input_with(operand, seen)
        changed.add(module)
