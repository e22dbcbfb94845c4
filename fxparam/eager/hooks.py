"""Hooks of a module that belong to one of its parametrized tensors, and go with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn import Module

__all__ = ["TensorHook", "drop_hooks"]


class TensorHook:
    """A hook of a module that has one of its parametrized tensors.

    Attributes:
        name: the name of the tensor.
    """

    name: str


def drop_hooks(module: Module, name: str) -> None:
    """Take a module's hooks off that belong to the tensor of the given name."""
    for hooks in (module._forward_pre_hooks, module._load_state_dict_pre_hooks):
        for key in list(_keys_of(hooks, name)):
            del hooks[key]


def _keys_of(hooks: dict[int, Any], name: str) -> Iterator[int]:
    for key, hook in hooks.items():
        hook = getattr(hook, "hook", hook)  # torch wraps those that see state dicts
        if isinstance(hook, TensorHook) and hook.name == name:
            yield key
