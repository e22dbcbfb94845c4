"""Reading a parametrized tensor: evaluate it, unless a scope reads it in another way.

The eager half knows no scopes. ``fxparam.scopes`` puts a :class:`Reading` of its own in this
module's place for one, and the properties of parametrized modules ask it.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.nn import Module

from fxparam.eager.lost_writes import watch

__all__ = ["Reading", "evaluated", "found_in_trace", "present", "use"]

# The property of a parametrized tensor, by the name of its code, and how many calls `evaluated` is
# below it at least.
_GETTER = "get_parametrized"
_BELOW = 3


def evaluated(chain: Module, name: str) -> Tensor:
    """Return a new value of a parametrized tensor, and warn if a write to it is lost.

    Args:
        chain: a ``ParametrizationList``.
        name: the name of the tensor; empty for a value that no user will see.
    """
    value: Tensor = chain()
    # Reads in a forward are the many. What it writes to is a step of its computation.
    if name and not _reader().endswith("forward"):
        watch(value, chain, name)
    return value


def _reader() -> str:
    """Return the name of the function that reads the tensor; a scope is between it and here."""
    frame: FrameType | None = sys._getframe(_BELOW + 1)
    while frame is not None and frame.f_code.co_name != _GETTER:
        frame = frame.f_back
    reader = None if frame is None else frame.f_back
    return "" if reader is None else reader.f_code.co_name


class Reading:
    """Evaluates at each access, as plain eager code does.

    Its methods get a ``ParametrizationList``, or the name of the tensor.
    """

    def value(self, chain: Module, name: str) -> Tensor:
        """Return the value of a parametrized tensor, for code that runs."""
        return evaluated(chain, name)

    def traced_value(self, chain: Module) -> Tensor:
        """Return the value of a parametrized tensor, for code that Dynamo traces."""
        return chain()  # type: ignore[no-any-return]

    def found_in_trace(self, name: str) -> bool:
        """Bind the local ``value`` of the getter that Dynamo traces, if its value is known already.

        Args:
            name: the name of the tensor. The module is the getter's local ``self``.
        """
        return False

    def forget(self, chain: Module) -> None:
        """Drop values of a parametrized tensor, whose originals are about to be assigned."""

    def is_shared(self) -> bool:
        """Check whether other readers may hold the tensor that ``value`` returns."""
        return False


_reading = Reading()


def present() -> Reading:
    """Return what reads parametrized tensors now."""
    return _reading


def use(reading: Reading) -> None:
    """Let ``reading`` read parametrized tensors from now on."""
    global _reading
    _reading = reading


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def found_in_trace(name: str) -> bool:
    """Do what the present reading's method of this name does, while Dynamo traces the call."""
    return _reading.found_in_trace(name)
