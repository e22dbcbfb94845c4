"""Tell whether evaluations have effects, by what they leave behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import Module

from fxparam.scopes.reach import held_by, reached
from fxparam.scopes.snapshot import Snapshot
from fxparam.scopes.state import State
from fxparam.scopes.unchanged import Unchanged

__all__ = ["evaluate_noting_effects"]


def evaluate_noting_effects(
    chains: Sequence[Module],
    evaluate: Callable[[], Sequence[Tensor]],
    before: Sequence[Unchanged | Snapshot],
) -> tuple[Sequence[Tensor], list[bool]]:
    """Return values, and whether each evaluation wrote no tensor and drew no random number.

    A power iteration writes, a random mask draws. So it is also noticed if another thread wrote or
    exchanged a tensor meanwhile. Python attributes that change are not noticed, nor is a generator
    that is found by a global name.

    Args:
        chains: ``ParametrizationList``s.
        evaluate: evaluates them.
        before: the state of each.
    """
    generators = list(dict.fromkeys(each for chain in chains for each in _generators(chain)))
    drawn = [each.get_state() for each in generators]
    values = evaluate()
    drew = not all(
        torch.equal(each.get_state(), state) for each, state in zip(generators, drawn, strict=True)
    )
    states = zip(chains, before, strict=True)
    return values, [not drew and was.compare(chain) is State.SAME for chain, was in states]


def _generators(chain: Module) -> list[Generator]:
    """Return the generators that an evaluation may draw from: its own, and those of its devices."""
    modules = list(chain.modules())
    held = (value for module in modules for value in held_by(module))
    own = [each for each in reached(held, modules, Generator) if isinstance(each, Generator)]
    devices = {tensor.device for tensor in (*chain.parameters(), *chain.buffers())}
    for device in devices:
        if device.type == "cuda":
            own.append(torch.cuda.default_generators[device.index])
    return [torch.default_generator, *own]
