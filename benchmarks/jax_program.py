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
    """Outputs and gradients are arrays; nothing is left in torch's parameters."""

    last: dict[str, Any]
    put: Callable[[Tensor], Any]
    given: list[Any]

    def give(self, inputs: Inputs) -> None:
        super().give(inputs)
        self.given = [self.put(x) for x in inputs]

    def tensors(self, outputs: list[Any]) -> list[Tensor]:
        return [_to_torch(array) for array in outputs]

    def gradients(self) -> dict[str, Tensor]:
        return {name: _to_torch(gradient) for name, gradient in self.last.items()}

    def buffers(self) -> dict[str, Tensor] | None:
        return None


def _to_torch(array: Any) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(array))


def jax_program(case: Case, contestant: Contestant, size: Size, setting: Setting) -> Program:
    """``jit`` of a step that gives outputs and gradients.

    Matrices are multiplied as precisely as torch does by default, which on a GPU is not JAX's way.

    Raises:
        NotImplementedError: for another setting than float32.
    """
    import jax

    if setting.dtype != "float32":
        raise NotImplementedError("the JAX contestants run in float32")
    jax.config.update("jax_default_matmul_precision", "highest")
    assert case.jax is not None
    forward, by_hand = case.jax, contestant.source == "by hand"
    device = jax.devices("gpu" if setting.device == "cuda" else "cpu")[0]
    model = reference(case, size, setting, sharing=False).model

    def put(t: Tensor) -> Any:
        return jax.device_put(t.detach().cpu().numpy(), device)

    named = dict(model.named_parameters())
    trained = {name: put(p) for name, p in named.items() if p.requires_grad}
    others = {name: p for name, p in named.items() if not p.requires_grad}
    fixed = {name: put(t) for name, t in (*others.items(), *model.named_buffers())}

    def loss(trained: dict[str, Any], inputs: list[Any]) -> tuple[Any, Any]:
        y = forward({**fixed, **trained}, inputs, by_hand)
        return (y**2).mean(), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def body(model: nn.Module, run: Run, inputs: Inputs, forward_done: Callable[[], None]) -> Any:
        (_, y), made.last = step(trained, made.given)
        jax.block_until_ready((y, made.last))
        return y

    made = _JaxProgram(model, model, (), body, setting, fixed=True)
    made.put = put
    made.give(inputs_of(case, size, setting))
    return made
