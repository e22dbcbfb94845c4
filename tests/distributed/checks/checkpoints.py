"""``torch.distributed.checkpoint`` between parametrized and plain models, sharded or not."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fxparam
from fxparam.distributed import ParametrizedParallel
from fxparam.parametrizations import orthogonal, spectral_norm, weight_norm
from tests import helpers
from tests.distributed.models import Half, batch, model


def _parametrized() -> nn.Module:
    made = model("plain")
    orthogonal(made.cell.wx, orthogonal_map="matrix_exp")
    weight_norm(made.cell.wh)
    fxparam.register_parametrization(made.out, "weight", Half())
    return made


def _sharded(made: nn.Module) -> nn.Module:
    return fully_shard(made, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _folder() -> str:
    """The same on all ranks."""
    made = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(made)
    assert made[0] is not None
    return made[0]


def check_plain_state_dict_of_a_sharded_model() -> None:
    alone, sharded = _parametrized(), _sharded(_parametrized())
    expected = fxparam.plain_state_dict(alone)
    for full in (True, False):
        found = fxparam.plain_state_dict(sharded, full=full)
        assert set(found) == set(expected)
        for name, value in found.items():
            assert isinstance(value, DTensor) != full, name
            whole = value if full else value.full_tensor()
            torch.testing.assert_close(whole, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert isinstance(sharded.cell.wx.parametrizations.weight.original, DTensor), "sharded again"
    plain = model("plain")
    plain.load_state_dict(fxparam.plain_state_dict(sharded))
    torch.testing.assert_close(sharded(batch()), plain(batch()))


def check_whole_tensors_load_into_a_sharded_model() -> None:
    sharded = _sharded(_parametrized())
    given = fxparam.plain_state_dict(_other(_parametrized()))
    fxparam.load_plain_state_dict(sharded, given)
    for name, value in fxparam.plain_state_dict(sharded).items():
        torch.testing.assert_close(value, given[name], msg=lambda m, n=name: f"{n}: {m}")


def check_evaluated_once() -> None:
    sharded = _sharded(model("pure"))
    assert helpers.counted(lambda: fxparam.plain_state_dict(sharded))[0] == 2


def check_from_parametrized_to_plain_and_back() -> None:
    folder, sharded = _folder(), _sharded(_parametrized())
    dcp.save(fxparam.plain_state_dict(sharded, full=False), checkpoint_id=folder)
    plain = _sharded(_other(model("plain")))
    given: dict[str, Any] = plain.state_dict()
    dcp.load(given, checkpoint_id=folder)
    plain.load_state_dict(given)
    torch.testing.assert_close(plain(batch()), sharded(batch()))

    other = _sharded(_other(_parametrized()))
    given = fxparam.plain_state_dict(other, full=False)
    dcp.load(given, checkpoint_id=folder)
    fxparam.load_plain_state_dict(other, given)
    torch.testing.assert_close(other(batch()), plain(batch()))
    other(batch()).sum().backward()
    assert other.cell.wx.parametrizations.weight.original.grad is not None

    with pytest.raises(CheckpointException, match="Missing key in checkpoint"):
        dcp.load(_parametrized().state_dict(), checkpoint_id=folder)


def check_own_keys() -> None:
    folder, sharded = _folder(), _sharded(_parametrized())
    dcp.save(sharded.state_dict(), checkpoint_id=folder)
    other = _sharded(_other(_parametrized()))
    given: dict[str, Any] = other.state_dict()
    dcp.load(given, checkpoint_id=folder)
    other.load_state_dict(given)
    torch.testing.assert_close(other(batch()), sharded(batch()))


def check_old_keys_of_weight_norm() -> None:
    made = _sharded(_parametrized())
    given = {
        name: value.full_tensor()
        for name, value in made.state_dict().items()
        if isinstance(value, DTensor)
    } | {name: value for name, value in made.state_dict().items() if not isinstance(value, DTensor)}
    for i, part in enumerate("gv"):
        given[f"cell.wh.weight_{part}"] = given.pop(f"cell.wh.parametrizations.weight.original{i}")
    alone = _other(_parametrized())
    alone.load_state_dict(given)
    torch.testing.assert_close(alone(batch()), made(batch()))


def check_made_on_meta() -> None:
    with torch.device("meta"):
        empty = model("plain")
        fxparam.register_parametrization(empty.cell.wx, "weight", Half())
        weight_norm(empty.cell.wh)
        spectral_norm(empty.out)
    sharded = _sharded(empty)
    sharded.to_empty(device="cpu")
    alone = model("plain")
    fxparam.register_parametrization(alone.cell.wx, "weight", Half())
    weight_norm(alone.cell.wh)
    spectral_norm(alone.out)
    sharded.load_state_dict(
        {
            name: _like(value, sharded.state_dict()[name])
            for name, value in alone.state_dict().items()
        }
    )
    torch.testing.assert_close(sharded.eval()(batch()), alone.eval()(batch()))


def _like(value: Any, held: Any) -> Any:
    if not isinstance(held, DTensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, held.device_mesh, held.placements)


def check_tensor_parallel() -> None:
    made = nn.Sequential(orthogonal(nn.Linear(8, 8), orthogonal_map="matrix_exp"))
    expected = fxparam.plain_state_dict(made)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(made, mesh, {"0": ParametrizedParallel(ColwiseParallel())})
    for name, value in fxparam.plain_state_dict(made).items():
        torch.testing.assert_close(value, expected[name])
    assert isinstance(fxparam.plain_state_dict(made, full=False)["0.weight"], DTensor)


def _other(made: nn.Module) -> nn.Module:
    """Change what is stored, to be loaded again."""
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.5).add_(0.01)
    return made
