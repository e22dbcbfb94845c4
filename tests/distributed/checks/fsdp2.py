"""FSDP2: ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxparam
from tests import helpers
from tests.distributed.models import batch, model, one_step


def _sharded(kind: str, *, cell: bool = True, reshard: bool = True) -> nn.Module:
    mesh, module = init_device_mesh("cpu", (dist.get_world_size(),)), model(kind)
    if cell:
        fully_shard(module.cell, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return module


def check_one_evaluation_in_a_call() -> None:
    for kind in ("pure", "orthogonal"):
        for cell in (True, False):
            module = _sharded(kind, cell=cell)
            backend = fxparam.backend("aot_eager")
            compiled = fxparam.compile(module, scope="call", backend=backend)

            def run(compiled: Any = compiled) -> Any:
                output = compiled(batch())
                output.square().mean().backward()
                return output.detach()

            assert one_step(module, run, kind).evaluations == (2, 2), (kind, cell)


def check_a_region_around_an_optimizers_step_is_not_stale() -> None:
    for reshard in (True, False):
        for cell in (True, False):
            for compiled in (False, True):
                module = _sharded("pure", cell=cell, reshard=reshard)
                optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
                run: Any = module
                if compiled:
                    run = torch.compile(module, backend=fxparam.backend("aot_eager"))
                with fxparam.cached():
                    run(batch()).square().mean().backward()
                    optimizer.step()
                    results = []
                    counts = helpers.counted(lambda run=run, r=results: r.append(run(batch())))
                assert counts[0] == 2, (reshard, cell, compiled, counts)
                torch.testing.assert_close(results[0], module(batch()))
