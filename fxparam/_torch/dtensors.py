"""``DTensor``: a tensor that several ranks hold parts of."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import Tensor
from torch.nn import Module

__all__ = [
    "apply_style",
    "is_dtensor",
    "placed",
    "sharded_first",
    "take_hooks",
    "value_like",
    "whole",
]


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Check whether a value is a ``DTensor``; no module is imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def placed(value: Any, mesh: Any, placements: Any) -> Tensor:
    """Return a value as a ``DTensor``. One that is none is whole, and the same on all ranks."""
    if not is_dtensor(value):
        tensor = sys.modules["torch.distributed.tensor"]
        everywhere = [tensor.Replicate()] * mesh.ndim
        value = tensor.DTensor.from_local(value, mesh, everywhere, run_check=False)
    found: Tensor = value.redistribute(mesh, placements)
    return found


def sharded_first(value: Tensor, mesh: Any) -> list[Any]:
    """Return the placements that shard a tensor along its first dimension."""
    tensor = sys.modules["torch.distributed.tensor"]
    return [tensor.Shard(0) if value.dim() else tensor.Replicate()] * mesh.ndim


def value_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a value placed like ``model`` where that is a ``DTensor``, else as a whole.

    Of another shape than the model it is sharded along its first dimension.
    """
    if not is_dtensor(model):
        gathered: Tensor = whole(value)
        return gathered
    mesh = model.device_mesh
    alike = value.shape == model.shape
    return placed(value, mesh, model.placements if alike else sharded_first(value, mesh))


def whole(value: Any) -> Any:
    """Return a ``DTensor`` gathered; any other value as it is."""
    return value.full_tensor() if is_dtensor(value) else value


def apply_style(style: Any, module: Module, mesh: Any) -> None:
    """Apply a ``ParallelStyle``, as ``parallelize_module`` does."""
    style._apply(module, mesh)


def take_hooks(module: Module, other: Module) -> None:
    """Give a module the hooks around the forward of another, which take the module they run on."""
    for hook in other._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)
    for after in other._forward_hooks.values():
        module.register_forward_hook(after)
