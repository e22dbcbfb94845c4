"""``cond`` refuses branches that give an operand gradients with different strides.

::

    torch.cond(p, lambda h, w: h * w, lambda h, w: h * w.transpose(0, 1), (h, w))

AOTAutograd compiles the backward as a ``cond`` of two branches. One returns the gradient of ``w``
with the strides (3, 1), the other with (1, 3), and it raises "The sorted order of strides of the
two branches' output doesn't match".

Seen on 2.11.0, 2.13.0 and 2.15.0, with ``aot_eager`` and ``inductor``; ``eager`` takes it. No
upstream issue was found. ``tests/graph/torch_bugs/test_branch_gradients.py`` shows it.

What we do: an operand is read through views in each branch that was changed. ::

    w.permute(order).reshape(-1).narrow(0, 0, numel).reshape(shape).permute(back)

The backward of these views gives the gradient the strides of the operand; that of ``narrow`` copies
it, as a gradient may be one number at every place (``w.sum()``). They copy nothing forward, as the
first ``permute`` makes a dense operand contiguous. A ``cond`` that we do not change stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.nesting import Level
from fxparam.graph.analysis.nodes import meta_with, value_of

__all__ = ["lay_gradients_out_alike", "with_gradient_laid_out_alike"]

_LAID_OUT = "fxparam.laid_out"


def with_gradient_laid_out_alike(operand: Node) -> Node:
    """Return views of a branch's operand whose gradient always has the operand's strides.

    An operand that is not dense, or of a size that is not known, is returned as it is.
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
    views: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("permute", (tuple(order),)),
        ("reshape", ((-1,),)),
        ("narrow", (0, 0, value.numel())),
        ("reshape", (tuple(sizes[i] for i in order),)),
        ("permute", (back,)),
    )
    for method, arguments in views:
        if method == "permute" and arguments == (tuple(range(len(order))),):
            continue
        value = getattr(value, method)(*arguments)
        with operand.graph.inserting_after(last):
            seen = last = operand.graph.call_method(method, (seen, *arguments))
        seen.meta = {**meta_with(operand, value), _LAID_OUT: True}
    return seen


def lay_gradients_out_alike(levels: list[Level], changed: set[GraphModule]) -> None:
    """Give each operand's gradient the same strides in all branches of the calls that changed.

    An operand that was read several times in a branch has a sum of gradients, whose strides are
    those of its first term. Sharing changes which term is first.

    Args:
        levels: all graphs of a capture.
        changed: those that sharing or code motion changed; the branches that are changed here are
            added to them.
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
