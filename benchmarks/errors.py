"""An error in one line, for a cell of a table."""

from __future__ import annotations

__all__ = ["first_line"]

_LENGTH = 120


def first_line(error: BaseException) -> str:
    """Its type and the first line of what it says; of the cause, where a backend only wraps one."""
    error = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("backend=")]
    text = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."
