"""The matrix exponential, with a backward that costs two products for each one of the value's.

``torch.matrix_exp`` computes its backward as the exponential of a matrix of twice the size. Here
it is the derivative of ``scaling.py``. How often a matrix is halved depends on its norm, which no
graph knows: hence two custom ops, of which the second is the backward of the first.

    grad_A = L(A, G^H)^H        L(A, E) is the derivative of the exponential at A in the direction E

The backward of the second op is the first op's, at the matrix ((A, E), (0, A)), in whose
exponential L(A, E) stands in the upper right corner. So derivatives of every order exist.
"""

from __future__ import annotations

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

# In a batch, from where the op is as fast as torch's: one matrix of 32 rows.
_FEWEST_NUMBERS = 32 * 32

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
    ``python -m benchmarks.maps``.
    """
    return a.shape[-1] > 1 and a.numel() >= _FEWEST_NUMBERS


def _matrix_exp(a: Tensor) -> Tensor:
    with without_autocast(a.device):
        value = scaling.exponential(_batch(a)) if _is_usual(a) else None
        return torch.matrix_exp(a) if value is None else value.view(a.shape)


def _derivative(a: Tensor, direction: Tensor) -> Tensor:
    with without_autocast(a.device):
        value = scaling.derivative(_batch(a), _batch(direction)) if _is_usual(a) else None
        return _derivative_of_torch(a, direction) if value is None else value.view(a.shape)


def _is_usual(a: Tensor) -> bool:
    """Check whether matrices are some for ``scaling.py``; others torch computes, or refuses."""
    square = a.dim() > 1 and a.shape[-1] == a.shape[-2]
    sized = square and a.shape[-1] > 1 and a.numel() > 0
    return sized and a.dtype in DTYPES and multiplies_exactly(a.dtype, a.device)


def _batch(a: Tensor) -> Tensor:
    return a.reshape(-1, *a.shape[-2:])


def _derivative_of_torch(a: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative of numbers, of no matrices, and where a norm is not finite."""
    n = a.shape[-1]
    return torch.matrix_exp(_both(a, direction))[..., :n, n:].contiguous()


def _both(a: Tensor, direction: Tensor) -> Tensor:
    """Return the matrix ((A, E), (0, A))."""
    upper = torch.cat([a, direction], dim=-1)
    return torch.cat([upper, torch.cat([torch.zeros_like(a), a], dim=-1)], dim=-2)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (a,) = ctx.saved_tensors
    derivative: Tensor = torch.ops.fxparam.matrix_exp_derivative(a, gradient.mH)
    return derivative.mH


def _backward_of_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, direction = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, torch.ops.fxparam.matrix_exp_derivative(a, gradient.mH).mH
    # The derivative is linear in the direction, whose norm need not become that of the matrix.
    n, scale = a.shape[-1], _norm(direction)
    none = torch.zeros_like(a)
    at = _both(a, direction / scale)
    towards = torch.cat([torch.cat([none, none], -1), torch.cat([gradient.mH, none], -1)], -2)
    found = torch.ops.fxparam.matrix_exp_derivative(at, towards).mH
    of_a = (found[..., :n, :n] + found[..., n:, n:]) * scale
    return of_a, found[..., :n, n:]


def _norm(direction: Tensor) -> Tensor:
    """Return the largest number of a matrix, 1 for a matrix of zeros."""
    size = direction.detach().abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, torch.ones_like(size))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _like(a: Tensor, *_: Tensor) -> Tensor:
    """Return what an op returns, where there are no data."""
    return torch.matrix_exp(a)


def _batched(op: Any) -> Any:
    """Return the rule of an op for batches of inputs: it takes batches itself."""

    def rule(info: Any, places: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        given = [
            x.expand(info.batch_size, *x.shape) if place is None else x.movedim(place, 0)
            for x, place in zip(inputs, places, strict=True)
        ]
        return op(*given), 0

    return rule


# Defined by schemas: torch.library.custom_op puts several calls of Python around each call.
for _name, _schema, _computed, _differentiated in (
    ("matrix_exp", "(Tensor a) -> Tensor", _matrix_exp, _backward),
    (
        "matrix_exp_derivative",
        "(Tensor a, Tensor direction) -> Tensor",
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
