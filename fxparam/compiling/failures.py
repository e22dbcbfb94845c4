"""A pass that fails costs speed and no run: the graph is compiled as it was captured.

The passes have changed the graph by then, so that Dynamo traces it anew, for a backend that does
not share. In strict mode the failure is an error.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.fx import Node

from fxparam._torch.dynamo import is_restart
from fxparam.graph.passes.share_regions import RegionRefusedError

__all__ = ["PassFailedError", "is_disabled", "is_strict", "named"]

_PASSES = Path(__file__).parents[1] / "graph" / "passes"


class PassFailedError(RuntimeError):
    """A pass raised what it should not. The error itself is the cause of this one."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"fxparam's pass {_place(error)}: {type(error).__name__}: {error}\n"
            "Set FXPARAM_DISABLE=1, or use fxparam.backend(strict=False), to compile unshared. "
            "Please report this to fxparam."
        )


def _place(error: Exception) -> str:
    """Return the name of the pass that raised an error, and the node that it looked at."""
    name, node = "hoist", None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.parent == _PASSES:
            name = path.stem
        found = frame.f_locals.get("node")
        node = found if isinstance(found, Node) else node
    return f"{name} failed on a graph" if node is None else f"{name} failed on node {node.name}"


@contextmanager
def named() -> Iterator[None]:
    """Let an error of a pass say that it is one.

    Raises:
        PassFailedError: the block raised an error that is neither a refusal nor Dynamo's request to
            trace anew.
    """
    try:
        yield
    except RegionRefusedError:
        raise
    except Exception as error:
        if is_restart(error):
            raise
        raise PassFailedError(error) from error


def is_disabled() -> bool:
    """Check whether the environment asks to compile every graph as it was captured."""
    return os.environ.get("FXPARAM_DISABLE") == "1"


def is_strict(strict: bool | None) -> bool:
    """Check whether a failure is an error; the environment decides where a user does not."""
    return os.environ.get("FXPARAM_STRICT") == "1" if strict is None else strict
