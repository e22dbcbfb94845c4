"""A failed ``torch.export`` of torch 2.11 leaves a global hook on buffers behind.

The hook looks at buffers assigned anywhere, and Dynamo cannot trace such an assignment any more.
torch 2.12 and newer take the hook away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fxparam._torch.names import global_buffer_hooks

__all__ = ["buffer_hooks_kept"]


@contextmanager
def buffer_hooks_kept() -> Iterator[None]:
    """Take away, in the end, the global hooks on assigned buffers that the block leaves behind."""
    hooks = global_buffer_hooks()
    before = set(hooks)
    try:
        yield
    finally:
        for key in set(hooks) - before:
            del hooks[key]
