"""Tell whether an evaluation has effects, by what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import Module

from fxparam.scopes.snapshot import Snapshot

__all__ = ["evaluate_noting_effects"]


def evaluate_noting_effects(chain: Module, evaluate: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Return a value, and whether its evaluation wrote no tensor and drew no random number.

    A power iteration writes, a random mask draws. So it is also noticed if another thread wrote a
    tensor meanwhile. Python attributes that change are not noticed.

    Args:
        chain: a ``ParametrizationList``.
        evaluate: evaluates it.
    """
    generators = _generators(chain)
    tensors, drawn = Snapshot(chain), [each.get_state() for each in generators]
    value = evaluate()
    pure = Snapshot(chain) == tensors and all(
        torch.equal(each.get_state(), before)
        for each, before in zip(generators, drawn, strict=True)
    )
    return value, pure


def _generators(chain: Module) -> list[Generator]:
    """Return the generators that an evaluation may draw from: its own, and those of its devices."""
    own = [v for m in chain.modules() for v in vars(m).values() if isinstance(v, Generator)]
    devices = {tensor.device for tensor in (*chain.parameters(), *chain.buffers())}
    for device in devices:
        if device.type == "cuda":
            own.append(torch.cuda.default_generators[device.index])
    return [torch.default_generator, *own]
