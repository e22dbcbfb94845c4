"""Check in a few microseconds that nothing which an evaluation reads has changed.

A :class:`~fxparam.scopes.snapshot.Snapshot` looks for all that an evaluation can get at. Most
parametrizations hold nothing but tensors, modules and constants. What they hold is then listed
once: the places, each a dictionary and a key, with the objects in them. Nothing has changed while
the places have these objects, no dictionary has grown, and no tensor was written or moved.
"""

from __future__ import annotations

import copyreg
from collections import deque
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fxparam._torch.fsdp import shard_behind
from fxparam._torch.tensors import are_unchanged, facts_of, storage_identity
from fxparam.scopes.reach import (
    constants_of,
    held_by_class,
    holds_nothing,
    is_constant,
    parts_of,
)
from fxparam.scopes.state import State

__all__ = ["Unchanged"]

_STORES = ("_parameters", "_buffers", "_modules")
# Hooks, of which each module has empty containers, and names. No value depends on them.
_OF_MODULES = frozenset(Module().__dict__) - {"training", *_STORES}
# What a ParametrizationList keeps for itself.
_OF_LISTS = frozenset({"unsafe", "is_tensor", "ntensors", "in_step"})
_PLAIN = (Tensor, Parameter)

_contents = attrgetter("cell_contents")


class _NotListed(Exception):
    """An evaluation can get at more than places in dictionaries."""


class Unchanged:
    """What the evaluations of a parametrization list read, as it is at one moment.

    It holds the dictionaries of the list's modules, and not the list. Made by :meth:`of`.
    """

    __slots__ = (
        "_cells",
        "_empty",
        "_facts",
        "_in_cells",
        "_lengths",
        "_pins",
        "_places",
        "_sized",
    )

    def __init__(self, chain: Module) -> None:
        modules = list(chain.modules())
        self._places: list[tuple[Any, str, Any]] = []
        for module in modules:
            self._places += _places(module, module is chain)
        dicts = [d for m in modules for d in (m.__dict__, *(m.__dict__[s] for s in _STORES))]
        self._empty = [each for each in dicts if not each]
        self._sized = [each for each in dicts if each]
        self._lengths = list(map(len, self._sized))
        classes = dict.fromkeys(map(type, modules))
        self._places += (place for cls in classes for place in constants_of(cls))
        reached = list(_reached(held for cls in classes for held in held_by_class(cls)))
        self._cells = [each for each in reached if isinstance(each, CellType)]
        self._in_cells = list(map(_contents, self._cells))
        held = (held for _, _, held in self._places)
        tensors = [each for each in (*held, *reached) if isinstance(each, Tensor)]
        if not all(map(_is_plain, tensors)) or any(shard_behind(t) is not None for t in tensors):
            raise _NotListed
        self._facts = list(map(facts_of, tensors))
        # So that no other storage gets the address of one of these.
        self._pins = list(map(storage_identity, tensors))

    @classmethod
    def of(cls, chain: Module) -> Unchanged | None:
        """Return the present state of a ``ParametrizationList``; None if it cannot be listed."""
        try:
            return cls(chain)
        except _NotListed:
            return None

    def is_same(self) -> bool:
        """Check that nothing was changed; quickly. False if a number was assigned anew."""
        try:
            return (
                are_unchanged(self._facts)
                and _first_exchanged(self._places) is None
                and self._has_as_many_places()
            )
        except (KeyError, RuntimeError):  # a tensor became one without a version
            return False

    def compare(self, chain: Module) -> State:
        """Return what has become of it."""
        if self.is_same():
            return State.SAME
        try:
            if not are_unchanged(self._facts):
                return State.WRITTEN
            state = self._compare_places()
        except (KeyError, RuntimeError):
            return State.OTHER
        return state if self._has_as_many_places() or state is State.WRITTEN else State.OTHER

    def _has_as_many_places(self) -> bool:
        """Check that no dictionary has grown or shrunk, and that cells hold what they held."""
        if any(self._empty) or list(map(len, self._sized)) != self._lengths:
            return False
        return not self._cells or all(map(is_, map(_contents, self._cells), self._in_cells))

    def _compare_places(self) -> State:
        """Return what has become of the objects in their places.

        Numbers and the like may have been assigned anew: a parametrization may count evaluations.
        """
        places = [(attributes, name, attributes.get(name)) for attributes, name, _ in self._places]
        for (_, name, was), (_, _, now) in zip(self._places, places, strict=True):
            if name == "training" and now != was:
                return State.WRITTEN
            if now is not was and not (is_constant(was) and is_constant(now)):
                return State.OTHER
        self._places = places
        return State.SAME


def _first_exchanged(places: list[tuple[Any, str, Any]]) -> str | None:
    """Return the first key under which there is another object now; None if there is none."""
    for attributes, name, held in places:
        if attributes[name] is not held:
            return name
    return None


def _places(module: Module, is_list: bool) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield where a module has what its ``forward`` reads: a dictionary, a key, an object.

    Raises:
        _NotListed: it has more, in containers or functions.
    """
    if copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
        raise _NotListed
    attributes = module.__dict__
    for name, value in attributes.items():
        if name in _OF_MODULES:
            if isinstance(value, dict) and value:
                raise _NotListed
        elif name in _STORES:
            yield attributes, name, value
            yield from ((value, key, held) for key, held in value.items())
        elif not (is_list and name in _OF_LISTS):
            if not (isinstance(value, Tensor) or holds_nothing(value)):
                raise _NotListed
            yield attributes, name, value


def _reached(start: Iterable[Any]) -> Iterator[Tensor | CellType]:
    """Yield the tensors that functions lead to, and the cells that they close over.

    Raises:
        _NotListed: they lead to modules, or to what may come to hold more.
    """
    seen: set[int] = set()
    work = list(start)
    if any(isinstance(value, Tensor) for value in work):
        raise _NotListed  # an attribute of a class, which may be assigned
    while work:
        value = work.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) in seen or holds_nothing(value):
            continue
        elif isinstance(value, (Module, dict, list, set, deque)):
            raise _NotListed
        else:
            seen.add(id(value))
            work += parts_of(value)
            if isinstance(value, FunctionType) and not _is_of_torch(value):
                yield from (cell for cell in value.__closure__ or () if _is_filled(cell))


def _is_of_torch(function: FunctionType) -> bool:
    """Check whether torch made a function, as its decorators do, which bind nothing anew."""
    return str(function.__globals__.get("__name__")).startswith("torch.")


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        raise _NotListed from None


def _is_plain(tensor: Tensor) -> bool:
    """Check whether the facts below tell that a tensor was changed."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_inference() or tensor.is_meta)
    )
