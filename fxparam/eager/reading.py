"""Reading a parametrized tensor: evaluate it, unless a scope reads it in another way.

The eager half knows no scopes. ``fxparam.scopes`` puts a :class:`Reading` of its own in this
module's place for one, and the properties of parametrized modules ask it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

__all__ = ["Reading", "present", "use"]


class Reading:
    """Evaluates at each access, as plain eager code does.

    Each method gets a ``ParametrizationList``.
    """

    def value(self, chain: Module) -> Tensor:
        """Return the value of a parametrized tensor, for code that runs."""
        return chain()  # type: ignore[no-any-return]

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
