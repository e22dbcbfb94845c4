"""A failed ``torch.export.export`` leaves a hook behind, and other models compile no more.

::

    torch.export.export(model_that_cannot_be_exported, args)          # raises
    torch.compile(model_that_assigns_a_buffer, fullgraph=True)(x)     # raises too, from now on

Non-strict export watches the assignment of buffers with a hook on all modules, and takes it away
only if it succeeds. Dynamo cannot trace the hook.

Seen on 2.11.0. Mended in 2.13.0: https://github.com/pytorch/pytorch/issues/172213,
https://github.com/pytorch/pytorch/pull/184956. ``tests/graph/torch_bugs/test_export_hooks.py``
shows it. What we do costs nothing where torch is mended: this file may go once 2.13 is the oldest
torch that is supported.

What we do: hooks that were not there before an export are taken away after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fxparam._torch.names import global_buffer_hooks

__all__ = ["buffer_hooks_kept"]


@contextmanager
def buffer_hooks_kept() -> Iterator[None]:
    """Take away, at the end of a block, the hooks on assigned buffers that it leaves behind."""
    hooks = global_buffer_hooks()
    before = set(hooks)
    try:
        yield
    finally:
        for key in set(hooks) - before:
            del hooks[key]
