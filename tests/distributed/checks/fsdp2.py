"""FSDP2: ``fully_shard``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fxparam
from fxparam import register_parametrization as register
from fxparam.parametrizations import orthogonal, weight_norm
from tests import helpers
from tests.distributed.models import WIDTH, Half, batch, model, one_step


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


def check_register_after_sharding() -> None:
    for kind in ("pure", "orthogonal"):
        for cell in (True, False):
            module = _sharded("plain", cell=cell)
            held = {name: p for name, p in module.named_parameters()}
            for layer in (module.cell.wx, module.cell.wh):
                if kind == "orthogonal":
                    orthogonal(layer, orthogonal_map="matrix_exp")
                fxparam.register_parametrization(layer, "weight", helpers.Counting())
                chain = layer.parametrizations.weight
                assert isinstance(chain.original, DTensor), "sharded again"
            named = dict(module.named_parameters())
            assert named["cell.wx.parametrizations.weight.original"] is held["cell.wx.weight"]
            compiled = fxparam.compile(module, scope="call", backend=fxparam.backend("aot_eager"))

            def run(compiled: Any = compiled) -> Any:
                output = compiled(batch())
                output.square().mean().backward()
                return output.detach()

            assert one_step(module, run, kind).evaluations == (2, 2), (kind, cell)


def _with_right_inverse(kind: str) -> nn.Module:
    mesh, module = init_device_mesh("cpu", (dist.get_world_size(),)), model("plain")
    if kind == "orthogonal":
        orthogonal(module.cell.wh, orthogonal_map="matrix_exp")
    else:
        register(module.cell.wh, "weight", Half())
    fully_shard(module.cell, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def check_assign_to_sharded() -> None:
    torch.manual_seed(1)
    value = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    for kind in ("pure", "orthogonal"):
        for gathered in (False, True):
            module = _with_right_inverse(kind)
            layer = module.cell.wh
            original = layer.parametrizations.weight.original
            if gathered:
                module.cell.unshard()
            layer.weight = value
            if gathered:
                module.cell.reshard()
            assert layer.parametrizations.weight.original is original
            module.cell.unshard()
            torch.testing.assert_close(layer.weight, value)
            module(batch()).sum().backward()
            assert original.grad is not None


def check_remove_from_sharded() -> None:
    for kind in ("pure", "orthogonal"):
        for keep in (True, False):
            module = _with_right_inverse(kind)
            layer = module.cell.wh
            original = layer.parametrizations.weight.original
            module.cell.unshard()
            value = layer.weight.detach().clone()
            if not keep:
                value = layer.parametrizations.weight.original.detach().clone()
            module.cell.reshard()
            expected = module(batch()).detach()
            fxparam.remove_parametrizations(layer, "weight", leave_parametrized=keep)
            assert layer.weight is original and isinstance(original, DTensor)
            torch.testing.assert_close(original.full_tensor(), value)
            output = module(batch())
            if keep:
                torch.testing.assert_close(output.detach(), expected)
            output.sum().backward()
            assert original.grad is not None


def check_what_makes_new_parameters_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Any) -> Any:
            return self.scale * x

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    half = model("plain")
    fully_shard(half, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    tied = model("plain")
    tied.out.weight = tied.cell.wx.weight
    fully_shard(tied, mesh=mesh)
    removed = model("plain")
    weight_norm(removed.cell.wx)
    fully_shard(removed, mesh=mesh)
    for refused, module in (
        (lambda layer: weight_norm(layer), _sharded("plain")),
        (lambda layer: register(layer, "weight", Scaled()), _sharded("plain")),
        (lambda layer: register(layer, "weight", Scaled()), _sharded("pure")),
        (lambda layer: register(layer, "weight", nn.Identity()), half),
        (lambda layer: register(layer, "weight", nn.Identity()), tied),
        (lambda layer: fxparam.remove_parametrizations(layer, "weight"), removed),
    ):
        before = {name: id(p) for name, p in module.named_parameters()}
        with pytest.raises(ValueError, match="is a parameter of fully_shard"):
            refused(module.cell.wx)
        assert before == {name: id(p) for name, p in module.named_parameters()}
        module(batch()).sum().backward()


def check_micro_batches_are_reduced_once() -> None:
    for cell in (True, False):
        module = _sharded("pure", cell=cell)
        backend = fxparam.backend("aot_eager")
        compiled = torch.compile(module, backend=backend)

        def run(module: Any = module, compiled: Any = compiled) -> Any:
            with fxparam.accumulate(module):
                for last in (False, True):
                    module.set_requires_gradient_sync(last)
                    output = compiled(batch())
                    (output.square().mean() / 2).backward()
            return output.detach()

        step = one_step(module, run, "pure")
        assert step.evaluations == (2, 2), (cell, step)
