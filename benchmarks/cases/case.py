"""A case: a small model of a real architecture, as people write it and hoisted by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["TINY", "Case", "Inputs", "Run", "Size", "loss_of", "reader"]

Inputs = tuple[Tensor, ...]
Run = Callable[..., Any]
# One measured step: calls the model, and gives its outputs.
Step = Callable[[Run, Inputs], Any]

_GROWTH = {"steps": (8, 32, 128), "layers": (4, 16, 64)}


@dataclass(frozen=True)
class Size:
    """Attributes:
    steps: how often a recurrence or a solver goes round.
    layers: how many layers, or applications of a tied one.
    width, batch: features and rows.
    """

    steps: int = 32
    layers: int = 16
    width: int = 128
    batch: int = 32


TINY = Size(steps=4, layers=2, width=8, batch=2)


def reader(module: nn.Module, by_hand: bool, name: str = "weight") -> Callable[[], Tensor]:
    """Return what a model calls wherever it uses a weight: by hand, it is read here and now."""
    if not by_hand:
        return lambda: getattr(module, name)
    value = getattr(module, name)
    return lambda: value


def loss_of(outputs: Any) -> Tensor:
    """Return one number that depends on every output."""
    tensors = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    precise = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([t.square().mean() for t in precise]).sum()


def _training_step(run: Run, inputs: Inputs) -> Any:
    outputs = run(*inputs)
    loss_of(outputs).backward()  # outside of what is compiled, as in most training
    return outputs


def _inference_step(run: Run, inputs: Inputs) -> Any:
    with torch.no_grad():
        return run(*inputs)


@dataclass(frozen=True)
class Case:
    """Attributes:
    name, about: as given to ``--case``, and one line.
    model: ``(size, by_hand) -> model``. As people write it a model reads its weights where it uses
        them; by hand it reads each once, as early as that is possible.
    inputs: the inputs of one step, drawn from torch's generator.
    grows: which knob the growth of the figures is measured along.
    size, tiny: what is measured; what the tests run.
    also: contestants that say something here, beside those that run in every case.
    train: whether a step has a backward.
    reads_once: whether the model as written reads each weight once, so that both are the same.
    effects: whether an evaluation writes buffers. One that is shared is then another program than
        the one as written.
    exported: whether what is compiled is exported and goes to AOTInductor.
    fullgraph: as ``torch.compile``'s, for every contestant that compiles.
    called_in_a_loop: whether a step calls the model in a loop that is not compiled, so that
        ``cached()`` is around the step.
    eager_by_hand: whether the source by hand runs in eager code, as Inductor needs many minutes
        for torch's backward of its parametrization.
    step, by_hand_step: what is timed; the second for the source by hand, if it differs.
    quick: whether it is among the cases of ``--quick``.
    """

    name: str
    about: str
    model: Callable[[Size, bool], nn.Module]
    inputs: Callable[[Size], Inputs]
    grows: Literal["steps", "layers"]
    size: Size = Size()
    tiny: Size = TINY
    also: tuple[str, ...] = ()
    train: bool = True
    reads_once: bool = False
    effects: bool = False
    exported: bool = False
    fullgraph: bool = True
    called_in_a_loop: bool = False
    eager_by_hand: bool = False
    step: Step | None = None
    by_hand_step: Step | None = None
    quick: bool = False

    def sizes(self) -> list[Size]:
        """Return the sizes at which growth is measured."""
        return [dataclasses.replace(self.size, **{self.grows: n}) for n in _GROWTH[self.grows]]

    def knob(self, size: Size) -> int:
        return int(getattr(size, self.grows))

    def step_of(self, by_hand: bool) -> Step:
        default = _training_step if self.train else _inference_step
        return (self.by_hand_step if by_hand else None) or self.step or default
