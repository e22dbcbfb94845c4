"""Whether products of matrices are as exact as the dtype of the matrices."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["is_autocast_enabled", "multiplies_exactly", "without_autocast"]

_SINGLE = (torch.float32, torch.complex64)
_EXACT = ("none", "ieee")


def multiplies_exactly(dtype: torch.dtype, device: torch.device) -> bool:
    """Check whether products in float32 are made in float32.

    ``torch.set_float32_matmul_precision("high")`` and its like let them be made in TF32 or
    bfloat16. LAPACK and its like do not follow that.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.set_float32_matmul_precision.html
    """
    if dtype not in _SINGLE:
        return True
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision in _EXACT


def is_autocast_enabled(device: torch.device) -> bool:
    """Check whether operations on a device are cast; torch raises where none ever are.

    >>> import torch
    >>> is_autocast_enabled(torch.device("meta"))
    False
    """
    known = torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which products are made in the dtype of the matrices."""
    if not is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
