"""``DTensor``: a tensor that several ranks hold parts of."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import Tensor
from torch.nn import Module

__all__ = ["apply_style", "is_dtensor", "take_hooks", "placed_like", "value_like", "whole"]


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Check whether a value is a ``DTensor``; no module is imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def value_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a value as a ``DTensor`` where ``model`` is one, placed like it, else as a whole.

    A value that is no ``DTensor`` is the same on all ranks.
    """
    if not is_dtensor(model):
        gathered: Tensor = whole(value)
        return gathered
    if not is_dtensor(value):
        tensor = sys.modules["torch.distributed.tensor"]
        everywhere = [tensor.Replicate()] * model.device_mesh.ndim
        value = tensor.DTensor.from_local(value, model.device_mesh, everywhere, run_check=False)
    return value.redistribute(  # type: ignore[attr-defined,no-any-return]
        model.device_mesh, model.placements
    )


def placed_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a whole value as a ``DTensor`` on the devices of ``model``, if that is one.

    It is placed like it where their shapes are equal, else sharded along its first dimension.
    """
    if not is_dtensor(model) or value.shape == model.shape:
        return value_like(value, model)
    tensor = sys.modules["torch.distributed.tensor"]
    mesh = model.device_mesh
    everywhere = tensor.DTensor.from_local(
        value, mesh, [tensor.Replicate()] * mesh.ndim, run_check=False
    )
    first = tensor.Shard(0) if value.dim() else tensor.Replicate()
    sharded: Tensor = everywhere.redistribute(mesh, [first] * mesh.ndim)
    return sharded


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
