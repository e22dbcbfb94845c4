"""FSDP2: ``fully_shard``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fxparam
from fxparam import register_parametrization as register
from fxparam.parametrizations import orthogonal, weight_norm
from tests import helpers
from tests.distributed.models import WIDTH, Half, batch, model, one_step


class Scaled(nn.Module):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Any) -> Any:
        return self.scale * x


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

            step = one_step(module, run, kind)
            assert step.evaluations == (2, 2), (kind, cell)
            # Those of the model as it is written.
            gathers, reductions = (10, 2) if cell else (2, 1)
            assert step.collectives == {"all_gather": gathers, "all_reduce": reductions}, step


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


def _nested(module: Any) -> Any:
    register(module, "weight", Half())
    register(module.parametrizations.weight, "original", Half())
    return module


def check_remove_nested_originals() -> None:
    for sharded_first in (False, True):
        module = model("plain")
        if not sharded_first:
            _nested(module.cell.wh)
        _fully_sharded(module)
        if sharded_first:
            _nested(module.cell.wh)
        output = module(batch()).detach()
        fxparam.remove_parametrizations(module.cell.wh, "weight")
        torch.testing.assert_close(module(batch()).detach(), output)
        module(batch()).sum().backward()
        assert isinstance(module.cell.wh.weight, DTensor)
        assert module.cell.wh.weight.grad is not None


def _fully_sharded(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def check_state_dicts_after_removal() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False))
    register(module[0], "weight", Half())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module[0], mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        module(torch.ones(2, 4))  # what was gathered stays
    fxparam.remove_parametrizations(module[0], "weight")
    held = module.state_dict()["0.weight"]
    assert isinstance(held, DTensor)
    ones = distribute_tensor(torch.ones(4, 4), held.device_mesh, held.placements)
    module.load_state_dict({"0.weight": ones})
    torch.testing.assert_close(next(module.parameters()).full_tensor(), torch.ones(4, 4))


def check_parameters_of_others_are_refused() -> None:
    class Buffered(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("shift", torch.ones(4))

    other = register(nn.Linear(4, 4), "weight", Half())
    for wrap in (_fully_sharded, DistributedDataParallel):
        layers = nn.Sequential(_nested(nn.Linear(4, 4)), Buffered(), nn.Linear(4, 4))
        wrapped = wrap(layers)  # else it is gone
        before = list(layers.state_dict())
        for refused in (
            lambda layers=layers: register(layers[0], "weight", Scaled()),
            lambda layers=layers: register(layers[1], "shift", Scaled()),
            lambda layers=layers: fxparam.transfer_parametrizations_and_params(other, layers[2]),
        ):
            with pytest.raises(ValueError, match="learns of no new parameters"):
                refused()
        assert before == list(layers.state_dict()) and wrapped is not None
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen[0].requires_grad_(False)
    wrapped = DistributedDataParallel(frozen)
    weight_norm(frozen[0])  # no gradient to be reduced
    assert wrapped.module is frozen


def check_shapes_of_assigned_values() -> None:
    module = _with_right_inverse("half")
    before = fxparam.plain_state_dict(module)
    with pytest.raises(RuntimeError, match="keeps its shape"):
        module.cell.wh.weight = torch.ones(1, WIDTH)
    for name, value in fxparam.plain_state_dict(module).items():
        torch.testing.assert_close(value, before[name])


def check_tensor_parallel_as_well_is_refused() -> None:
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count, 1), mesh_dim_names=("data", "tensor"))
    layers = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(layers, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(layers, mesh=mesh["data"])
    with pytest.raises(ValueError, match="tensor parallelism shards as well"):
        register(layers[0], "weight", Half())
