"""A guard of Dynamo's on which inputs of a graph share memory.

Dynamo guards which inputs are one object, parameters apart, and not which are views of one memory
(https://github.com/pytorch/pytorch/issues/139789).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fxparam._torch.names import lookup
from fxparam._torch.tensors import is_wrapper_subclass, storage_of

__all__ = ["guard_shared_memory"]


def guard_shared_memory(placeholders: Sequence[torch.fx.Node]) -> None:
    """Let Dynamo compile anew once other ones among some inputs share memory than do now.

    Left out are inputs without a storage, and those on which Dynamo has no guard.

    Args:
        placeholders: those of the graph that Dynamo is compiling.
    """
    context = lookup("torch._guards", "TracingContext").try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    guarded = {guard.originating_source for guard in guards}
    inputs: dict[Any, Any] = {}
    for node in placeholders:
        source, value = getattr(node, "_dynamo_source", None), node.meta.get("example_value")
        if source in guarded and not is_wrapper_subclass(value) and storage_of(value) is not None:
            inputs[source] = value
    if len(inputs) < 2:
        return
    create = partial(_create, sources=tuple(inputs), wanted=_pattern(*inputs.values()))
    guards.add(lookup("torch._guards", "Guard")(next(iter(inputs)), create))


def _create(builder: Any, guard: Any, sources: Sequence[Any], wanted: tuple[int, ...]) -> None:
    """Add the guard to those of a compiled frame, when Dynamo makes them.

    Args:
        builder: Dynamo's ``GuardBuilder``.
        guard: the guard that is made.
        sources: how the inputs are reached from the frame.
        wanted: their pattern of memory.
    """
    names = ", ".join(builder.arg_ref(source.name) for source in sources)
    code = f"___shared_memory({names}) == {wanted}"
    known = lookup("torch._dynamo.guards", "_get_closure_vars")()
    builder.add_python_lambda_leaf_guard_to_root(
        [code], [code], closure_vars={**known, "___shared_memory": _pattern}
    )


def _pattern(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Return, for each tensor, the position of the first one that has the same storage."""
    firsts: dict[object, int] = {}
    return tuple(firsts.setdefault(storage_of(t), i) for i, t in enumerate(tensors))
