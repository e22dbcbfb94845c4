"""Errors of value and gradients against float64, of two ways to compute a function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the value of a function, and the gradients of its inputs for one fixed cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(value, leaves, cotangent.to(value.dtype))
    return [value.detach(), *gradients]


def errors(
    function: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor
) -> list[float]:
    """Return the errors of value and gradients, relative to the norm of what ``exact`` gives."""
    right = results(exact, *(x.to(_WIDE[x.dtype]) for x in inputs))
    pairs = zip(results(function, *inputs), right, strict=True)
    return [float((x.to(y.dtype) - y).norm() / y.norm().clamp_min(1e-30)) for x, y in pairs]
