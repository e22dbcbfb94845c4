"""Dynamo: read from its side effects what traced code has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxparam._torch.dynamo import tracer_output
from fxparam._torch.names import lookup

__all__ = ["held_as", "node_of_variable", "traced_assignments", "traced_changes"]

# Stands for what an object has not.
_MISSING = object()


def traced_assignments(module: int) -> list[str]:
    """Return what traced code has assigned to attributes of a module and its submodules.

    Assigned tensors are left out, and values equal to those that were there. Dynamo performs
    assignments only after the graph has run; until then they stand in its side effects.

    Args:
        module: the ``id()`` of the module.

    Returns:
        One text for each assignment, to be compared with that of another moment.
    """
    tensor = lookup("torch._dynamo.variables", "TensorVariable")
    effects = tracer_output().side_effects
    root = effects.id_to_variable.get(module)
    found: list[str] = []
    for owner in root.value.modules() if root is not None else ():
        variable = effects.id_to_variable.get(id(owner))
        for name, value in effects.store_attr_mutations.get(variable, {}).items():
            if not isinstance(value, tensor) and not _is_constant(value, held_as(owner, name)):
                found.append(f"{id(owner)}.{name}={value!r}")
    return found


def traced_changes() -> Iterator[tuple[object, str, torch.fx.Node | None]]:
    """Find what traced code has changed of objects that were there before it.

    Dynamo makes changes only after the graph has run; until then they stand in its side effects.

    Yields:
        For each change the object, or Dynamo's variable for it; the name of the changed attribute
        or key, empty if not known; the node of the tensor assigned, None if it is no tensor.
    """
    output = tracer_output()
    if output is None:
        return
    effects = output.side_effects
    there: dict[int, object] = {}
    for identity, variable in list(effects.id_to_variable.items()):
        kind = type(variable.mutation_type).__name__
        own_cell = getattr(variable, "local_name", None) in output.root_tx.f_code.co_cellvars
        if kind == "NoneType" or kind.endswith("New") or own_cell:
            continue
        if not effects.is_modified(variable):
            continue
        there = there or {id(each): each for each in effects.keepalive}
        owner = there.get(identity, variable)
        values = effects.store_attr_mutations.get(variable) or _items_of(variable, owner)
        if not values:
            yield owner, "", None
        for name, value in values.items():
            if not _stands_for(value, held_as(owner, name)):
                yield owner, name, node_of_variable(value)


def held_as(owner: object, name: str) -> object:
    """Return a dictionary's value under a key, or the value of an object's own attribute.

    An object that is nothing else if there is none.
    """
    held = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    return held.get(name, _MISSING)


def _items_of(variable: Any, owner: object) -> dict[Any, Any]:
    """Return the values of a changed dictionary by key.

    Empty if the variable is no dictionary, or has other keys than the one that it stands for.
    """
    try:
        items = {key.vt.as_python_constant(): value for key, value in variable.items.items()}
    except (AttributeError, NotImplementedError):
        return {}
    return items if isinstance(owner, dict) and owner.keys() == items.keys() else {}


def node_of_variable(variable: Any) -> torch.fx.Node | None:
    """Return the node of one of Dynamo's variables; None if it stands for no tensor."""
    tensor = isinstance(variable, lookup("torch._dynamo.variables", "TensorVariable"))
    return variable.as_proxy().node if tensor else None


def _stands_for(variable: Any, value: object) -> bool:
    """Check whether a variable of Dynamo's stands for an object, or for an equal constant."""
    if hasattr(variable, "is_realized") and not variable.is_realized():
        return bool(variable.original_value() is value)
    try:
        own = getattr(variable, "value", variable)
    except NotImplementedError:  # a list with a tensor in it
        return False
    return own is value or _is_constant(variable, value)


def _is_constant(variable: Any, value: object) -> bool:
    """Check whether one of Dynamo's variables stands for a constant that is written as ``value``.

    Equal numbers may be others: 0.0 and -0.0, (1, 2) and (1.0, 2).
    """
    try:
        constant = variable.as_python_constant() if variable.is_python_constant() else variable
        same = type(constant) is type(value) and bool(constant == value)
    except (NotImplementedError, RuntimeError):  # there is a tensor in it, though it says it is one
        return False
    return same and (constant is value or repr(constant) == repr(value))
