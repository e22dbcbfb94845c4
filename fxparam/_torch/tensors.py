"""Tensors: their storage, how they lie in it, their version counters and wrappers.

This is the one home of the question whether two tensors are the same memory (:func:`share_memory`)
seen in the same way (:func:`geometry`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from fxparam._torch.names import lookup

__all__ = [
    "Facts",
    "are_unchanged",
    "facts_of",
    "functorch_level",
    "geometry",
    "inner_of",
    "is_view_of_another",
    "is_wrapper_subclass",
    "owns_memory",
    "share_memory",
    "storage_identity",
    "storage_of",
    "version_of",
    "was_written",
]

#: A tensor, and what changes when it is written, moved or seen in another way.
Facts = tuple[torch.Tensor, int, bool, int, int, tuple[int, ...]]

_level = lookup("torch._C._functorch", "maybe_get_level")
_use_count = lookup("torch._C", "_storage_Use_Count")
_is_wrapper_subclass = lookup("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")


def inner_of(tensor: Any) -> Any:
    """Return the one tensor that a wrapper holds, and a tensor that is none as it is.

    A ``DTensor`` holds its local tensor. None for a wrapper that holds several, or none.
    """
    while is_wrapper_subclass(tensor):
        held = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        inner = [each for each in held if isinstance(each, torch.Tensor)]
        if len(inner) != 1:
            return None
        (tensor,) = inner
    return tensor


def storage_identity(tensor: Any) -> tuple[object, object]:
    """Return the storage behind ``tensor`` and a number that identifies it while it is held.

    Once a storage is freed, another may get its number. A wrapper that holds one tensor has that
    one's. ``(None, None)`` for a tensor without storage: a wrapper of several, a functorch wrapper,
    a sparse tensor. The number is the address of the storage as an object, not that of its data: a
    fake tensor has no data, and warns when asked.
    """
    try:
        storage = inner_of(tensor).untyped_storage()
        return storage, storage._cdata
    except (RuntimeError, NotImplementedError, AttributeError):
        return None, None


def functorch_level(tensor: torch.Tensor) -> int:
    """Return the nesting level of the ``torch.func`` transform that wraps a tensor, or -1."""
    return int(_level(tensor))


def is_wrapper_subclass(tensor: object) -> bool:
    """Check whether ``tensor`` is of a subclass that holds other tensors."""
    return bool(_is_wrapper_subclass(tensor))


def is_view_of_another(tensor: torch.Tensor) -> bool:
    """Check whether autograd knows ``tensor`` as a view, which ``detach_`` refuses."""
    return tensor._is_view()


def storage_of(tensor: Any) -> object:
    """Return the number of the storage behind ``tensor``, equal for tensors that share memory.

    None for one without a storage. The number holds while some tensor keeps the storage alive.
    """
    return storage_identity(tensor)[1]


def share_memory(one: Any, other: Any) -> bool:
    """Check whether two tensors are known to live in the same storage."""
    storage = storage_of(one)
    return storage is not None and storage == storage_of(other)


def geometry(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Return how a tensor lies in its storage: dtype, shape, strides and offset.

    Strides and offset are None for layouts that have none (sparse tensors).
    """
    if tensor.layout is not torch.strided:
        return tensor.dtype, tensor.shape, None, None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def version_of(tensor: torch.Tensor) -> int | None:
    """Return the version counter; None for an inference tensor, which has none."""
    return None if tensor.is_inference() else tensor._version


def owns_memory(tensor: torch.Tensor) -> bool:
    """Check whether a tensor is a plain one with memory that torch made for it alone.

    A view has not, nor has a tensor with views, or one on the memory of NumPy or other processes.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    storage = tensor.untyped_storage()
    alone = _use_count(storage._cdata) <= 2  # the tensor and `storage`
    return alone and storage.resizable() and not storage.is_shared()


def facts_of(tensor: torch.Tensor) -> Facts:
    """Return a tensor with what changes when it is written, moved or seen in another way.

    While somebody keeps its storage, no other one has its address.
    """
    return (
        tensor,
        tensor._version,
        tensor.requires_grad,
        tensor.data_ptr(),
        tensor.numel(),
        tensor.stride(),
    )


def are_unchanged(facts: list[Facts]) -> bool:
    """Check whether tensors are as they were.

    Raises:
        RuntimeError: one became an inference tensor, which has no version.
    """
    for tensor, version, requires_grad, address, numel, stride in facts:
        if (
            tensor._version != version
            or tensor.data_ptr() != address
            or tensor.requires_grad is not requires_grad
            or tensor.numel() != numel
            or tensor.stride() != stride
        ):
            return False
    return True


def was_written(tensor: torch.Tensor, version: int) -> bool:
    """Check whether a tensor was written since it had a version."""
    return tensor._version != version
