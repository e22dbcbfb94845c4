"""Pickling and copying of parametrized modules.

No module holds a shared class under its name, so that a pickle cannot name it: the original class
takes its place in what is pickled, and the shared class is made again on the other side.

``torch.nn.utils.parametrizations.weight_norm`` registers a function defined inside it, which no
pickle can name: it renames the keys of state dicts from before parametrizations. An equal hook of
a class defined here takes its place in what is pickled
(https://github.com/pytorch/pytorch/issues/137409).
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from fxparam.eager.hooks import TensorHook

__all__ = ["KEY", "WeightNormKeys", "reduce_method", "setstate_method"]

#: The attribute of a shared class that holds its original class and its parametrized names.
KEY = "_fxparam_key"
_HOOKS = "_load_state_dict_pre_hooks"


def reduce_method(
    original: Any, names: frozenset[str], rebuild: Callable[..., Any]
) -> Callable[[Any, Any], Any]:
    """Return the ``__reduce_ex__`` of a shared class, for pickle, ``torch.save`` and ``copy``.

    The original class says how its instances are reduced (its own ``__reduce_ex__``,
    ``__reduce__``, ``__getstate__``); the shared class, which no module holds under its name, is
    replaced by the original one and made again on the other side.

    Args:
        original: the original class.
        names: the parametrized tensors of the shared class.
        rebuild: makes an instance of the shared class, from ``original``, ``names`` and what the
            original class makes its instances with; a function that pickles can name.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if KEY not in type(self).__dict__:
            # A class was put on top (FSDP does so): whether that pickles is its own affair.
            return original.__reduce_ex__(self, protocol)
        reducer = copyreg.dispatch_table.get(original)
        # A state may hold values of parametrized tensors, as that of torch.nn.GRU does. With a
        # history they could not be copied.
        with torch.no_grad():
            reduced = reducer(self) if reducer else original.__reduce_ex__(self, protocol)
        if isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        shared = type(self)
        make, *arguments = (original if x is shared else x for x in (make, *arguments))
        if rest:
            rest[0] = _with_slots(self, original, _with_picklable_hooks(rest[0]))
        return (rebuild, (original, tuple(sorted(names)), make, *arguments), *rest)

    return __reduce_ex__


def _with_slots(module: Module, original: Any, state: Any) -> Any:
    """Return the state of a module together with the values of its class's ``__slots__``.

    ``Module.__getstate__`` leaves them out. A state of any other form is returned as it is.
    """
    names = copyreg._slotnames(type(module))  # type: ignore[attr-defined]
    slots = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if slots and isinstance(state, dict) and original.__setstate__ is Module.__setstate__:
        return state, slots
    return state


def setstate_method(original: Any) -> Callable[[Any, Any], None]:
    """Return the ``__setstate__`` of a shared class, which takes states with slots too."""

    def __setstate__(self: Any, state: Any) -> None:
        slots: dict[str, Any] = {}
        if isinstance(state, tuple) and original.__setstate__ is Module.__setstate__:
            state, slots = state  # Module.__setstate__ only knows about the dictionary
        original.__setstate__(self, state or {})
        for name, value in slots.items():
            setattr(self, name, value)

    return __setstate__


class WeightNormKeys(TensorHook):
    """Rename ``<name>_g`` and ``<name>_v`` in a state dict to the originals of ``<name>``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        old = [f"{prefix}{self.name}_{part}" for part in "gv"]
        if all(key in state_dict for key in old):
            for i, key in enumerate(old):
                new = f"{prefix}parametrizations.{self.name}.original{i}"
                state_dict[new] = state_dict.pop(key)


def _with_picklable_hooks(state: Any) -> Any:
    """Return the state of a module with :class:`WeightNormKeys` for torch's weight norm hooks.

    Other hooks stay as they are. ``test_torch_parametrizations`` needs the replacement.
    """
    hooks = state.get(_HOOKS) if isinstance(state, dict) else None
    if not hooks:
        return state
    replaced = type(hooks)((key, _picklable(wrapped)) for key, wrapped in hooks.items())
    return {**state, _HOOKS: replaced}


def _picklable(wrapped: Any) -> Any:
    hook: Any = getattr(wrapped, "hook", None)
    if getattr(hook, "__qualname__", "") != "weight_norm.<locals>._weight_norm_compat_hook":
        return wrapped
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    replaced = copy.copy(wrapped)
    replaced.hook = WeightNormKeys(cells["name"].cell_contents)
    return replaced
