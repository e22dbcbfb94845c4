"""Reading a parametrized tensor: evaluate it, unless a scope reads it in another way.

The eager half knows no scopes. ``fxparam.scopes`` puts a :class:`Reading` of its own in this
module's place for one, and the properties of parametrized modules ask it.
"""

from __future__ import annotations

import sys

from torch import Tensor
from torch.nn import Module

from fxparam.eager.lost_writes import watch

__all__ = ["Reading", "evaluated", "present", "use"]

# How many calls below the code that reads `evaluated` is: the property, two of its parts, itself.
_READER = 4


def evaluated(chain: Module, name: str) -> Tensor:
    """Return a new value of a parametrized tensor, and warn if a write to it is lost.

    Args:
        chain: a ``ParametrizationList``.
        name: the name of the tensor; empty for a value that no user will see.
    """
    value: Tensor = chain()
    # Reads in a forward are the many. What it writes to is a step of its computation.
    if name and not sys._getframe(_READER).f_code.co_name.endswith("forward"):
        watch(value, chain, name)
    return value


class Reading:
    """Evaluates at each access, as plain eager code does.

    Each method gets a ``ParametrizationList``, and ``value`` the name of the tensor.
    """

    def value(self, chain: Module, name: str) -> Tensor:
        """Return the value of a parametrized tensor, for code that runs."""
        return evaluated(chain, name)

    def traced_value(self, chain: Module) -> Tensor:
        """Return the value of a parametrized tensor, for code that Dynamo traces."""
        return chain()  # type: ignore[no-any-return]

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
