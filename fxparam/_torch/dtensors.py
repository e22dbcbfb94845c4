"""``DTensor``: a tensor that several ranks hold parts of."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import Tensor
from torch.nn import Module

__all__ = ["apply_style", "is_dtensor", "take_hooks", "value_like"]


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Check whether a value is a ``DTensor``; no module is imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def value_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a value as a ``DTensor`` where ``model`` is one, placed like it, else as a whole.

    A value that is no ``DTensor`` is the same on all ranks.
    """
    if not is_dtensor(model):
        return value.full_tensor() if is_dtensor(value) else value
    if not is_dtensor(value):
        tensor = sys.modules["torch.distributed.tensor"]
        everywhere = [tensor.Replicate()] * model.device_mesh.ndim
        value = tensor.DTensor.from_local(value, model.device_mesh, everywhere, run_check=False)
    return value.redistribute(  # type: ignore[attr-defined,no-any-return]
        model.device_mesh, model.placements
    )


def apply_style(style: Any, module: Module, mesh: Any) -> None:
    """Apply a ``ParallelStyle``, as ``parallelize_module`` does."""
    style._apply(module, mesh)


def take_hooks(module: Module, other: Module) -> None:
    """Give a module the hooks around the forward of another, which take the module they run on."""
    for hook in other._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)
    for after in other._forward_hooks.values():
        module.register_forward_hook(after)
