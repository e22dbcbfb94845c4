"""Tell what has become of the tensors and modules that a value was computed from."""

from __future__ import annotations

import enum

__all__ = ["State"]


class State(enum.Enum):
    """How what an evaluation would read now compares with what an earlier one has read."""

    SAME = enum.auto()
    #: The same objects, of which one was changed: they will not be as they were again.
    WRITTEN = enum.auto()
    #: Other objects, which may be exchanged for the former ones.
    OTHER = enum.auto()
