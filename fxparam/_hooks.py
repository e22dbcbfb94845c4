"""Hooks that torch's ``weight_norm`` leaves on a module, in a form that pickles.

``torch.nn.utils.parametrizations.weight_norm`` registers a function defined inside it, which no
pickle can name: it renames the keys of state dicts from before parametrizations. An equal hook of
a class defined here takes its place in what is pickled.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["WeightNormKeys", "with_picklable_hooks"]

_HOOKS = "_load_state_dict_pre_hooks"


class WeightNormKeys:
    """Rename ``<name>_g`` and ``<name>_v`` in a state dict to the originals of ``<name>``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        old = [f"{prefix}{self.name}_{part}" for part in "gv"]
        if all(key in state_dict for key in old):
            for i, key in enumerate(old):
                new = f"{prefix}parametrizations.{self.name}.original{i}"
                state_dict[new] = state_dict.pop(key)


def with_picklable_hooks(state: Any) -> Any:
    """The state of a module with torch's weight norm hooks replaced; others stay as they are."""
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
