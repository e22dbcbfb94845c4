"""Which ``cached()`` region the running code is in.

The answer is a context variable, so it belongs to one thread of execution: a thread starts outside
every region, an asyncio task inherits the region of the code that started it. A thread that was
handed a copy of a context, region included, is outside it all the same: two threads never share a
region. So is a checkpointed function that is called in a region: it runs again in backward, maybe
after the region, has to evaluate and save as much as it did then, and finds what it had saved by
counting.

Dynamo cannot trace a context variable, and a guard on a ``threading.local`` compares the wrong
dictionary. It does guard an attribute of a module, by reading it again at each call. ``active`` is
therefore a property of *this module*: eager code and Dynamo's guards both get the answer for the
context they run in.
"""

from __future__ import annotations

import sys
import threading
import types
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from fxparam import _private

if TYPE_CHECKING:
    from torch.nn import Module

    from fxparam._stamp import Entry

__all__ = ["Region", "active", "current", "region_variable"]


class Region:
    """The values that one ``cached()`` region shares, by parametrization list and then by mode."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.checkpoint = _private.checkpoint_around()
        self.depth = 0
        # Weak, so that a long region does not keep models alive which their owner has dropped.
        self.entries: WeakKeyDictionary[Module, dict[object, Entry]] = WeakKeyDictionary()

    def enter(self) -> None:
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.entries.clear()

    @property
    def usable(self) -> bool:
        return (
            self.depth > 0
            and self.thread == threading.get_ident()
            and self.checkpoint is _private.checkpoint_around()
        )


region_variable: ContextVar[Region | None] = ContextVar("fxparam_region", default=None)


def current() -> Region | None:
    """The region the running code is in, or None."""
    region = region_variable.get()
    return region if region is not None and region.usable else None


class _ContextModule(types.ModuleType):
    @property
    def active(self) -> bool:
        return current() is not None


if TYPE_CHECKING:
    active: bool
else:
    sys.modules[__name__].__class__ = _ContextModule
