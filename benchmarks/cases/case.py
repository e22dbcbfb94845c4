"""What a case is: a small model of a real architecture, written twice, with a knob for its size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Case", "Size", "inference_step", "loss_of", "precise", "training_step"]

Inputs = tuple[Tensor, ...]
Run = Callable[..., Any]
# One measured step: the model, the way to call it, its inputs, and a function to call when the
# forward half is over. Returns the outputs.
Step = Callable[[nn.Module, Run, Inputs, Callable[[], None]], Any]

STEPS = (8, 32, 128)
LAYERS = (4, 16, 64)


@dataclass(frozen=True)
class Size:
    """Attributes:
    steps: how often a recurrence, a solver or a generator goes round.
    layers: how many layers, or applications of a tied one.
    width: features.
    batch: rows.
    """

    steps: int = 32
    layers: int = 16
    width: int = 128
    batch: int = 32


TINY = Size(steps=4, layers=2, width=8, batch=2)


def loss_of(outputs: Any) -> Tensor:
    """One number that depends on every output; outside of what is compiled, as in most training."""
    tensors = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return torch.stack([precise(t).square().mean() for t in tensors]).sum()


def precise(t: Tensor) -> Tensor:
    """In float32, or what is more precise: results are checked against the model in float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def training_step(
    model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]
) -> Any:
    outputs = run(*inputs)
    forward_done()
    loss_of(outputs).backward()
    return outputs


def inference_step(
    model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]
) -> Any:
    with torch.no_grad():
        outputs = run(*inputs)
    forward_done()
    return outputs


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: as given to ``--case``.
    about: one line.
    written: the model as people write it, which reads its weights where it uses them.
    by_hand: the same model and state with every weight read once, as early as that is possible.
    inputs: the inputs of one step, drawn from torch's generator.
    grows: which knob the growth of the figures is measured along.
    size, tiny: what is measured; what the tests run.
    train: whether a step has a backward.
    effects: whether an evaluation writes buffers. Then one that is shared is another program than
        the one as written, and contestants that share are checked against eager under ``cached()``.
    exported: whether what is compiled is exported and goes to AOTInductor.
    fullgraph: as ``torch.compile``'s, for every contestant that compiles: a break is an error.
    scope: what fxparam can be asked for here, beyond what it does unasked: ``cached()`` in the
        compiled code (``cached``) or around a whole step (``around``), a scope of ``compile``
        (``call``, ``frozen``), ``accumulate()``, or an export that folds.
    step, by_hand_step: what is timed; the second for the source hoisted by hand, if it differs.
    jax: ``(parameters, inputs, by_hand) -> output`` in JAX, from parameters under torch's names.
    quick: whether it is among the cases of ``--quick``.
    """

    name: str
    about: str
    written: Callable[[Size], nn.Module]
    by_hand: Callable[[Size], nn.Module]
    inputs: Callable[[Size], Inputs]
    grows: Literal["steps", "layers"]
    size: Size = Size()
    tiny: Size = TINY
    train: bool = True
    effects: bool = False
    exported: bool = False
    fullgraph: bool = True
    scope: Literal["cached", "call", "around", "accumulate", "frozen", "fold"] | None = None
    step: Step | None = None
    by_hand_step: Step | None = None
    jax: Callable[[dict[str, Any], Sequence[Any], bool], Any] | None = None
    quick: bool = False

    def sizes(self) -> list[Size]:
        """The sizes at which growth is measured, ``size`` among them."""
        values = {*(STEPS if self.grows == "steps" else LAYERS), self.knob(self.size)}
        return [dataclasses.replace(self.size, **{self.grows: value}) for value in sorted(values)]

    def small(self) -> Size:
        """What ``--quick`` measures: the same widths, the shortest growth."""
        return self.sizes()[0]

    def knob(self, size: Size) -> int:
        return int(getattr(size, self.grows))

    def step_of(self, by_hand: bool) -> Step:
        default = training_step if self.train else inference_step
        return (self.by_hand_step if by_hand else None) or self.step or default
