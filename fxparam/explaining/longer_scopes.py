"""Which scope would evaluate less than the present one, and how much less."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxparam.explaining.facts import Scope, TensorExplained

__all__ = ["longer_scopes"]

# What a region shares although a graph may not: it evaluates once, with its effects.
_IN_A_REGION = {5}


def longer_scopes(scope: str, tensors: Sequence[TensorExplained]) -> tuple[Scope, ...]:
    """Return the scopes that would evaluate less than the present one does."""
    named = [each for each in tensors if each.kind and each.runs]
    now = sum(each.runs or 0 for each in named)
    if not named or scope == "frozen":
        return ()
    call = sum(
        min(
            each.runs or 0,
            1 + sum(r.count for r in each.refused if r.number not in _IN_A_REGION),
        )
        for each in named
    )
    found = []
    if scope == "graph" and call < now:
        effects = any(r.number in _IN_A_REGION for each in named for r in each.refused)
        found.append(Scope("call", call, now, "fxparam.compile(model, scope='call')", effects))
    pure = [each for each in named if not each.refused]
    kept = now - sum(each.runs or 0 for each in pure)
    if torch.is_grad_enabled():
        step = 8 * kept + len(pure)
        found.append(
            Scope("step", step, 8 * now, "fxparam.accumulate(model) around 8 micro-batches")
        )
    else:
        how = "fxparam.compile(model, scope='frozen'), from the second call on,"
        found.append(Scope("frozen", kept, now, how))
    return tuple(each for each in found if each.runs < each.now)
