"""The operands of calls and the placeholders of their bodies, changed together."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.nodes import meta_with, value_of
from fxparam.graph.scopes import Context, Scope

__all__ = [
    "drop_operands",
    "lay_gradients_out_alike",
    "merge_operands",
    "used_operands",
    "with_gradient_laid_out_alike",
]

_LAID_OUT = "fxparam.laid_out"


def merge_operands(contexts: list[Context]) -> int:
    """Make operands one that are the same in each call; ops refuse operands that alias."""
    calls = [context.current for context in contexts]
    seats: dict[tuple[int, ...], int] = {}
    doubled: dict[int, int] = {}
    for i, column in enumerate(zip(*(call.operands for call in calls), strict=True)):
        if all(isinstance(value, Node) for value in column):
            first = seats.setdefault(tuple(map(id, column)), i)
            if first != i:
                doubled[i] = first
    if not doubled:
        return 0
    skip = len(calls[0].varying)
    for body in calls[0].bodies:
        placeholders = body.placeholders[skip:]
        for i, first in doubled.items():
            placeholders[i].replace_all_uses_with(placeholders[first])
    drop_operands(contexts, set(doubled))
    return len(doubled)


def with_gradient_laid_out_alike(operand: Node) -> Node:
    """The operand of a branch, seen so that its gradient has the operand's strides in every branch.

    torch 2.13's ``cond`` refuses branches whose gradients have different strides, which ``h * w``
    and ``h * w.mT`` give. The backward of a view of a flat view lays a gradient out anew; views
    cost nothing. What is not dense, or of a size that is not known, is left as it is.
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


def lay_gradients_out_alike(scopes: list[Scope], changed: set[GraphModule]) -> None:
    """Where a branch was changed, let every operand's gradient have one layout in all branches.

    What repeats in a branch and is shared there sums its gradients in another order, and the sum
    has the strides of its first term.
    """
    calls = [c.current for scope in scopes for c in scope.live if c.call.branches]
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


def used_operands(context: Context) -> set[int]:
    """Indices of the operands that a body reads."""
    call = context.current
    skip = len(call.varying)
    columns = zip(*(body.placeholders[skip:] for body in call.bodies), strict=True)
    return {i for i, column in enumerate(columns) if any(p.users for p in column)}


def drop_operands(contexts: list[Context], unused: set[int]) -> None:
    """Take operands that nothing reads any more from the calls and from their bodies."""
    bodies = contexts[0].current.bodies
    for context in contexts:
        call = context.current
        call.set_operands([v for i, v in enumerate(call.operands) if i not in unused])
    skip = len(contexts[0].call.varying)
    for body in bodies:
        for i, placeholder in enumerate(body.placeholders[skip:]):
            if i in unused:
                body.module.graph.erase_node(placeholder)
