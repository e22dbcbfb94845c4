"""Weights that are computed from ``DTensor``s: SimpleFSDP, and plain ones beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fxparam
from tests import helpers
from tests.distributed.models import WIDTH, Step, batch, model, one_step


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _gathering(module: nn.Module) -> nn.Module:
    """Shard each parameter, and gather it whenever it is read, as SimpleFSDP's classes do."""
    mesh = _mesh()

    def read(name: str) -> Any:
        def get(self: nn.Module) -> Tensor:
            whole = self._parameters[name].redistribute(placements=[Replicate()])  # type: ignore[union-attr]
            return whole.to_local(grad_placements=[Partial("avg")])

        return property(get)

    for each in list(module.modules()):
        names = [name for name, _ in each.named_parameters(recurse=False)]
        for name in names:
            sharded = distribute_tensor(getattr(each, name).detach(), mesh, [Shard(0)])
            each.register_parameter(name, nn.Parameter(sharded))
        if names:
            each.__class__ = type(
                f"Gathering{type(each).__name__}",
                (type(each),),
                {name: read(name) for name in names},
            )
    return module


def _step(module: nn.Module, kind: str, *, grad: bool = True) -> Step:
    compiled = torch.compile(module, backend=fxparam.backend("aot_eager"), fullgraph=True)

    def run() -> Any:
        with torch.set_grad_enabled(grad):
            output = compiled(batch())
        if grad:
            output.square().mean().backward()
        return output.detach()

    return one_step(module, run, kind, check=grad)


def check_one_gather_for_each_parameter() -> None:
    for kind in ("pure", "orthogonal"):
        module = _gathering(model(kind))
        count = len(list(module.parameters()))
        step = _step(module, kind)
        assert step.evaluations == (2, 2), (kind, step)
        assert step.collectives["all_gather"] == count, (kind, step)
        assert sum(step.collectives.values()) == 2 * count, (kind, step)
        inference = _step(_gathering(model(kind)), kind, grad=False)
        assert sum(inference.collectives.values()) == count, (kind, inference)


def check_plain_weights_beside_dtensors() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = torch.tanh(self.rnn(x))
                x = x + self.b(torch.relu(self.a(x)))
            return x

    x = batch(0)
    for engine in ("gathering", "tensor parallel"):
        torch.manual_seed(0)
        module = Beside()
        fxparam.register_parametrization(module.rnn, "weight", helpers.Counting())
        expected = module(x)
        if engine == "gathering":
            _gathering(module.a)
            _gathering(module.b)
        else:
            plan: Any = {"a": ColwiseParallel(), "b": RowwiseParallel()}
            parallelize_module(module, _mesh(), plan)
        compiled = torch.compile(module, backend=fxparam.backend("aot_eager"))
        compiled(x).sum().backward()
        results: list[Tensor] = []

        def run(compiled: Any = compiled, results: list[Tensor] = results) -> None:
            results.append(compiled(x))
            results[-1].sum().backward()

        assert helpers.counted(run) == (1, 1), engine
        torch.testing.assert_close(results[-1], expected)
