"""A case in JAX as a program; JAX is an optional extra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.case import Case, Inputs, Run, Size
from benchmarks.contestants import Contestant
from benchmarks.programs import Program, Setting, inputs_of, reference

__all__ = ["jax_program"]


class _JaxProgram(Program):
    """Gradients come with the outputs; nothing is left in torch's parameters."""

    last: dict[str, Any]

    def gradients(self) -> dict[str, Tensor] | None:
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return {n: _to_torch(g) for n, g in self.last.items() if n in trained}

    def buffers(self) -> dict[str, Tensor] | None:
        return None


def _to_torch(array: Any) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(array))


def jax_program(case: Case, contestant: Contestant, size: Size, setting: Setting) -> Program:
    """``jit`` of a step that gives outputs and, in training, gradients.

    Raises:
        NotImplementedError: for another setting than float32.
    """
    import jax

    if setting.dtype != "float32":
        raise NotImplementedError("the JAX contestants run in float32")
    assert case.jax is not None
    forward, by_hand = case.jax, contestant.source == "by hand"
    device = jax.devices("gpu" if setting.device == "cuda" else "cpu")[0]
    model = reference(case, size, setting, sharing=False).model
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters = {n: jax.device_put(t.detach().cpu().numpy(), device) for n, t in state.items()}
    given = [jax.device_put(x.cpu().numpy(), device) for x in inputs_of(case, size, setting)]

    def loss(parameters: dict[str, Any], inputs: list[Any]) -> tuple[Any, Any]:
        y = forward(parameters, inputs, by_hand)
        return (y**2).mean(), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def body(model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]) -> Any:
        (_, y), made.last = step(parameters, given)
        jax.block_until_ready((y, made.last))
        return _to_torch(y)

    made = _JaxProgram(model, model, (), body, setting)
    return made
