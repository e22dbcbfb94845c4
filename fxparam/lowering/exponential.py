"""The matrix exponential, with a backward that costs two products for each one of the value's.

``torch.matrix_exp`` computes its backward as the exponential of a matrix of twice the size. Here
it is the derivative of ``scaling.py``. How often a matrix is halved depends on its norm, which no
graph knows: hence two custom ops, of which the second is the backward of the first.

    grad_A = L(A, G^H)^H        L(A, E) is the derivative of the exponential at A in the direction E

The backward of the second op is the first op's, at the matrix ((A, E), (0, A)), in whose
exponential L(A, E) stands in the upper right corner. So derivatives of every order exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxparam._torch.names import inside_forward_ad, inside_functorch
from fxparam.lowering import scaling
from fxparam.lowering.asked import asks_for_gradients
from fxparam.lowering.precision import multiplies_exactly, without_autocast

__all__ = ["DTYPES", "is_faster", "matrix_exp"]

#: In the others torch does not compute a usable value, or raises.
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)

# From where the op is as fast as torch's: one matrix of 48 rows, four of 32 or sixteen of 20.
_LEAST_WORK = 48**3

# What the derivative of one matrix needs while it is computed, in multiples of the matrix.
_NEEDED = 17

# How often a matrix is halved is read from the device, which no CUDA graph can record.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)


def matrix_exp(a: Tensor) -> Tensor:
    """Return the exponential of square matrices, ``torch.linalg.matrix_exp`` up to rounding.

    It is torch's own where no gradient will be asked for, in code that is traced, under transforms
    of ``torch.func`` and where a gradient is carried forward, which a custom op does not take part
    in, and for what torch alone takes or is faster at.

    Args:
        a: shape ``(..., n, n)``.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.linalg.matrix_exp.html

    >>> import torch
    >>> a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    >>> matrix_exp(a).detach()  # a rotation by one radian
    tensor([[ 0.5403,  0.8415],
            [-0.8415,  0.5403]])
    """
    if not asks_for_gradients(a):
        return torch.matrix_exp(a)
    if a.dtype not in DTYPES or not is_faster(a) or inside_functorch() or inside_forward_ad():
        return torch.matrix_exp(a)
    value: Tensor = torch.ops.fxparam.matrix_exp(a)
    return value


def is_faster(a: Tensor) -> bool:
    """Check whether the op is at least as fast as torch's, backward included.

    Of less than that, torch makes fewer calls than the op does. Measured on one CPU thread by
    ``python -m benchmarks maps``.
    """
    return a.shape[-1] > 1 and a.numel() * a.shape[-1] >= _LEAST_WORK


def _matrix_exp(a: Tensor, max_bytes: int = 0) -> Tensor:
    with without_autocast(a.device):
        value = _in_parts(scaling.exponential, max_bytes, a) if _is_usual(a) else None
        return torch.matrix_exp(a) if value is None else value


def _derivative(a: Tensor, direction: Tensor, max_bytes: int = 0) -> Tensor:
    with without_autocast(a.device):
        value = _in_parts(scaling.derivative, max_bytes, a, direction) if _is_usual(a) else None
        return _derivative_of_torch(a, direction) if value is None else value


def _in_parts(
    function: Callable[..., Tensor | None], max_bytes: int, *inputs: Tensor
) -> Tensor | None:
    """Run a function of batches on parts of them, as large as they may be.

    Args:
        function: of inputs of shape ``(batch, n, n)``; None stands for no result.
        max_bytes: what it may hold while it works, if it is more than one matrix needs; 0: any.
        inputs: of shape ``(..., n, n)``.
    """
    batches = [x.reshape(-1, *x.shape[-2:]) for x in inputs]
    first = batches[0]
    count = len(first)
    if max_bytes:
        each = _NEEDED * first[0].numel() * first.element_size()
        count = max(1, min(count, max_bytes // each))
    if count == len(first):
        whole = function(*batches)
        return None if whole is None else whole.view(inputs[0].shape)
    result = first.new_empty(first.shape)  # laid out as the function does, and torch
    parts = -(-len(first) // count)
    for into, *part in zip(*(x.tensor_split(parts) for x in (result, *batches)), strict=True):
        value = function(*part)
        if value is None:
            return None
        into.copy_(value)
    return result.view(inputs[0].shape)


def _is_usual(a: Tensor) -> bool:
    """Check whether matrices are some for ``scaling.py``; others torch computes, or refuses."""
    square = a.dim() > 1 and a.shape[-1] == a.shape[-2]
    sized = square and a.shape[-1] > 1 and a.numel() > 0
    return sized and a.dtype in DTYPES and multiplies_exactly(a.dtype, a.device)


def _derivative_of_torch(a: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative of numbers, of no matrices, and where a norm is not finite."""
    n = a.shape[-1]
    return torch.matrix_exp(_both(a, direction))[..., :n, n:].contiguous()


def _both(a: Tensor, direction: Tensor) -> Tensor:
    """Return the matrix ((A, E), (0, A))."""
    upper = torch.cat([a, direction], dim=-1)
    return torch.cat([upper, torch.cat([torch.zeros_like(a), a], dim=-1)], dim=-2)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (a,) = ctx.saved_tensors
    derivative: Tensor = torch.ops.fxparam.matrix_exp_derivative(a, gradient.mH, ctx.max_bytes)
    return derivative.mH, None


def _backward_of_derivative(
    ctx: Any, gradient: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    a, direction = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        of_direction = torch.ops.fxparam.matrix_exp_derivative(a, gradient.mH, ctx.max_bytes)
        return None, of_direction.mH, None
    # The derivative is linear in the direction, whose norm need not become that of the matrix.
    n, scale = a.shape[-1], _norm(direction)
    none = torch.zeros_like(a)
    at = _both(a, direction / scale)
    towards = torch.cat([torch.cat([none, none], -1), torch.cat([gradient.mH, none], -1)], -2)
    found = torch.ops.fxparam.matrix_exp_derivative(at, towards, ctx.max_bytes).mH
    of_a = (found[..., :n, :n] + found[..., n:, n:]) * scale
    return of_a, found[..., :n, n:], None


def _norm(direction: Tensor) -> Tensor:
    """Return the largest number of a matrix, 1 for a matrix of zeros."""
    if direction.numel() == 0:
        return direction.new_ones(())
    size = direction.detach().abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, torch.ones_like(size))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_bytes = inputs
    ctx.save_for_backward(*tensors)


def _like(a: Tensor, *_: Any) -> Tensor:
    """Return what an op returns, where there are no data."""
    return torch.matrix_exp(a)


def _batched(op: Any) -> Any:
    """Return the rule of an op for batches of inputs: it takes batches itself."""

    def rule(info: Any, places: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        given = [
            x.expand(info.batch_size, *x.shape) if place is None else x.movedim(place, 0)
            for x, place in zip(inputs, places, strict=True)
            if isinstance(x, Tensor)
        ]
        return op(*given, *inputs[len(given) :]), 0

    return rule


# Defined by schemas: torch.library.custom_op puts several calls of Python around each call.
for _name, _schema, _computed, _differentiated in (
    ("matrix_exp", "(Tensor a, int max_bytes=0) -> Tensor", _matrix_exp, _backward),
    (
        "matrix_exp_derivative",
        "(Tensor a, Tensor direction, int max_bytes=0) -> Tensor",
        _derivative,
        _backward_of_derivative,
    ),
):
    _qualified = f"fxparam::{_name}"
    torch.library.define(_qualified, _schema, tags=_TAGS)
    torch.library.impl(_qualified, "CompositeExplicitAutograd", _computed)
    torch.library.register_fake(_qualified, _like)
    torch.library.register_autograd(_qualified, _differentiated, setup_context=_save)
    torch.library.register_vmap(_qualified, _batched(getattr(torch.ops.fxparam, _name)))
