"""Short texts about modules, for messages.

A message never holds ``repr(module)``, which prints every layer of a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch.nn import Module

__all__ = ["check_kind", "first_names", "kind_of", "spelled", "tensors_of"]

_SHOWN = 10


def kind_of(value: object) -> str:
    """Return the name of the class of ``value``; of a class or function its own name."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    return type(value).__name__


def check_kind(name: str, value: object, kind: type, way_out: str) -> None:
    """Raise TypeError unless an argument is an instance of a class.

    Args:
        name: the name of the argument.
        value: the argument.
        kind: the class.
        way_out: a sentence on how to get one.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be of class {kind.__name__}.\n"
            f"required: {kind.__module__}.{kind.__name__}\n"
            f"found: {kind_of(value)}\n{way_out}"
        )


def spelled(name: object) -> str:
    """Return a name in quotes; for what is no string, as a module by mistake, its class."""
    return f"'{name}'" if isinstance(name, str) else kind_of(name)


def first_names(names: Iterable[object]) -> str:
    """Return names in brackets, at most ten of them, and the number of the others."""
    every = [spelled(name) for name in names]
    more = f", and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"[{', '.join(every[:_SHOWN])}{more}]"


def tensors_of(module: Module) -> str:
    """Return the names of the parameters and buffers that ``module`` itself holds, at most ten."""
    return first_names([*module._parameters, *module._buffers])
