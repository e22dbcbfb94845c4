"""Find the tensors that a module's ``forward`` can get at, through the objects that hold them.

Followed are containers, modules, and functions with what they close over and their defaults; a
tensor that is reached by none of these would be stale in a region after a write, without notice.
Global names and the attributes of other objects are not: through them everything can be reached.
"""

from __future__ import annotations

import copyreg
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Generator, Tensor
from torch.nn import Module

__all__ = [
    "constants_of",
    "held_by",
    "held_by_class",
    "holds_nothing",
    "is_constant",
    "parts_of",
    "reached",
]

_SEQUENCES = (list, tuple, set, frozenset, deque)
_LEAVES = frozenset({bool, int, float, complex, str, bytes, type(None), type})
# What else is looked into for what it holds, beside tensors and modules: see `parts_of`.
_FOLLOWED = (
    *_SEQUENCES,
    dict,
    types.MappingProxyType,
    types.FunctionType,
    types.MethodType,
    staticmethod,
    classmethod,
    property,
    partial,
)
_OFTEN_EMPTY = frozenset({dict, OrderedDict, set})
# For each class of modules, where in its MRO which attributes may hold tensors. Names alone, as a
# function may hold its class, which must not keep itself alive.
_class_attributes: WeakKeyDictionary[type, tuple[tuple[int, str], ...]] = WeakKeyDictionary()


def held_by(module: Module) -> list[Any]:
    """Return the attributes of a module and of its class that may hold tensors.

    Not those in ``_parameters``, ``_buffers`` and ``_modules``.
    """
    attributes = module.__dict__
    stores = [attributes.get(name) for name in ("_parameters", "_buffers", "_modules")]
    names = copyreg._slotnames(type(module))  # type: ignore[attr-defined]  # cached on the class
    own: list[Any] = [getattr(module, name) for name in names if hasattr(module, name)]
    for value in attributes.values():
        kind = type(value)
        # A module has a dozen containers for hooks, nearly always empty.
        if kind not in _LEAVES and not (kind in _OFTEN_EMPTY and not value):
            own.append(value)
    return [v for v in own if not any(v is store for store in stores)] + held_by_class(type(module))


def reached(start: Iterable[Any], known: Iterable[Module], *others: type) -> Iterator[Any]:
    """Yield each tensor and module that ``start`` leads to, once.

    The order is the same in each call, as long as nothing was changed.

    Args:
        start: any objects.
        known: modules that are not yielded, and not looked into.
        others: classes of other objects to be yielded.
    """
    seen, work = set(map(id, known)), list(start)
    while work:
        value = work.pop()
        kind = type(value)
        if kind in _LEAVES or id(value) in seen:
            continue
        seen.add(id(value))
        # By its type: a weak proxy answers for another object, which may be gone.
        if issubclass(kind, (Tensor, *others)):
            yield value
        elif issubclass(kind, Module):
            yield value
            for store in (value._parameters, value._buffers, value._modules):
                work += store.values()
            work += held_by(value)
        else:
            work += parts_of(value)


def parts_of(value: Any) -> Iterable[Any]:
    """Return the objects in a container, function, method, property or partial; else none."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict.values(value)
    if kind is types.MappingProxyType:
        return value.values()  # type: ignore[no-any-return]
    if issubclass(kind, _SEQUENCES):
        return value  # type: ignore[no-any-return]
    if kind is types.FunctionType:
        return _parts_of_function(value)
    if kind is types.MethodType:
        return value.__func__, value.__self__
    if kind in (staticmethod, classmethod):
        return (value.__func__,)
    if kind is property:
        return value.fget, value.fset
    if issubclass(kind, partial):
        return value.func, value.args, value.keywords
    return ()


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    """Return the defaults of a function and what it closes over."""
    found: list[Any] = [function.__defaults__, *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return found


def constants_of(cls: type) -> list[tuple[Any, str, Any]]:
    """Return the constants among the attributes of a class of modules: where, name and value.

    One may be assigned a tensor later. Those of torch's classes and of this package's are left out.
    """
    return [
        (vars(base), name, value)
        for base in cls.__mro__[: cls.__mro__.index(Module)]
        if not _is_torchs_or_ours(base)
        for name, value in vars(base).items()
        if not name.startswith("__") and is_constant(value)
    ]


def is_constant(value: Any) -> bool:
    """Check whether an object is a number, a text or the like."""
    return type(value) in _LEAVES


def holds_nothing(value: Any) -> bool:
    """Check whether nothing is reached through an object, and nothing will be."""
    kind = type(value)
    if issubclass(kind, (tuple, frozenset)):
        return all(map(holds_nothing, value))
    return kind in _LEAVES or not issubclass(kind, (Tensor, Module, *_FOLLOWED))


def held_by_class(cls: type) -> list[Any]:
    """Return the attributes of a class of modules that may hold tensors, base classes included."""
    bases = cls.__mro__
    return [vars(bases[depth]).get(name) for depth, name in _places(cls)]


def _places(cls: type) -> tuple[tuple[int, str], ...]:
    """Return which attributes of which base class may hold tensors, by position in the MRO."""
    places = _class_attributes.get(cls)
    if places is None:
        places = _class_attributes[cls] = tuple(
            (depth, name)
            for depth, base in enumerate(cls.__mro__[: cls.__mro__.index(Module)])
            if not _is_torchs_or_ours(base)
            for name, value in vars(base).items()
            if _may_hold(name, value)
        )
    return places


def _is_torchs_or_ours(cls: type) -> bool:
    """Check whether a class is torch's or this package's, whose attributes lead to no tensors."""
    return cls.__module__.partition(".")[0] in ("torch", "fxparam")


def _may_hold(name: str, value: Any) -> bool:
    """Check whether an attribute of a class may lead to a tensor."""
    kind = type(value)
    if issubclass(kind, (Tensor, Module, Generator, dict, *_SEQUENCES)):
        return not name.startswith("__")
    if kind is types.FunctionType:
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        # super() makes a function close over its class.
        cells = set(value.__code__.co_freevars) - {"__class__"}
        return bool(cells) or any(type(default) not in _LEAVES for default in defaults)
    return any(_may_hold("", part) for part in parts_of(value))
