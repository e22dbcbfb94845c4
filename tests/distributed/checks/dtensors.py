"""Weights that are computed from ``DTensor``s: SimpleFSDP, and plain ones beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fxparam
from fxparam.compiling import check_ranks
from fxparam.distributed import Sharded
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


def _step(module: nn.Module, kind: str, *, grad: bool = True, check: bool = True) -> Step:
    compiled = torch.compile(module, backend=fxparam.backend("aot_eager"), fullgraph=True)

    def run() -> Any:
        with torch.set_grad_enabled(grad):
            output = compiled(batch())
        if grad:
            output.square().mean().backward()
        return output.detach()

    return one_step(module, run, kind, check=grad and check)


# Before, Dynamo makes a function of each redistribution, of which no two are known to be the same.
_UNDERSTOOD = torch.__version__ >= "2.13"


def check_one_gather_for_each_parameter() -> None:
    if not _UNDERSTOOD:
        return
    for kind in ("pure", "orthogonal"):
        module = _gathering(model(kind))
        count = len(list(module.parameters()))
        step = _step(module, kind)
        assert step.evaluations == (2, 2), (kind, step)
        assert step.collectives["all_gather"] == count, (kind, step)
        assert sum(step.collectives.values()) == 2 * count, (kind, step)
        inference = _step(_gathering(model(kind)), kind, grad=False)
        assert sum(inference.collectives.values()) == count, (kind, inference)


def _sharded(module: nn.Module) -> nn.Module:
    """Shard each parameter, and gather it by a parametrization."""
    shards: dict[Any, Any] = {}
    for each in list(module.modules()):
        for name, held in list(each.named_parameters(recurse=False)):
            if held not in shards:
                shards[held] = nn.Parameter(distribute_tensor(held.detach(), _mesh(), [Shard(0)]))
            each.register_parameter(name, shards[held])
            fxparam.register_parametrization(each, name, Sharded())
    return module


def check_sharded_as_a_parametrization() -> None:
    if not _UNDERSTOOD:
        return
    for kind in ("plain", "pure", "orthogonal"):
        evaluations = (0, 0) if kind == "plain" else (2, 2)
        step = _step(_sharded(model(kind)), kind)
        assert step == Step(evaluations, {"all_gather": 5, "all_reduce": 5}), kind
        step = _step(_sharded(model(kind)), kind, grad=False)
        assert step == Step((evaluations[0], 0), {"all_gather": 5}), kind
    made, sharded = model("orthogonal"), _sharded(model("orthogonal"))
    keys = {*made.state_dict()}
    assert {*fxparam.plain_state_dict(sharded, full=False)} == {
        key.replace(".parametrizations.weight.original", ".weight")
        for key in keys
        if not key.endswith(".base")
    }
    value = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    plain = _sharded(nn.Linear(WIDTH, WIDTH))
    plain.weight = value
    torch.testing.assert_close(plain.weight, value)
    with pytest.raises(TypeError, match="distribute_tensor"):
        fxparam.register_parametrization(nn.Linear(2, 2), "weight", Sharded())
    with pytest.raises(ValueError, match="'avg' or 'sum'"):
        Sharded("mean")


def check_tied_weights_are_gathered_once() -> None:
    if not _UNDERSTOOD:
        return
    for shard in (_gathering_tied, _sharded):
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, False))
        module[1].weight = module[0].weight
        step = _step(shard(module), "plain", check=False)
        assert step.collectives == {"all_gather": 1, "all_reduce": 1}, shard


def _gathering_tied(module: nn.Module) -> nn.Module:
    made = _gathering(module)
    made[1]._parameters["weight"] = made[0]._parameters["weight"]  # type: ignore[index]
    return made


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


class Gathered(nn.Module):
    """Gathers the rows of a parameter, of which ranks may have other numbers."""

    def forward(self, x: Tensor) -> Tensor:
        rows = functional_collectives.all_gather_tensor_autograd(
            x.sin().sum(0, keepdim=True), 0, dist.group.WORLD
        )
        return x * rows.sum(0)


class Rows(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, WIDTH))
        fxparam.register_parametrization(self, "weight", Gathered())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(x @ self.weight.mT) @ self.weight
        return x


def check_sizes_of_a_rank_decide_nothing() -> None:
    if not _UNDERSTOOD:
        return  # torch's own backward of the gather fails
    rank = dist.get_rank()
    module = Rows(9 - rank)
    size = 8 * WIDTH * 4  # what rank 0 has is larger
    backend = fxparam.backend("aot_eager", max_bytes=size, check_ranks=True)
    module(batch()).sum().backward()
    expected = module.weight.detach(), module.parametrizations.weight.original.grad
    module.zero_grad()
    torch.compile(module, backend=backend, fullgraph=True)(batch()).sum().backward()
    assert backend.reports[-1].entries[0].runs == 1
    torch.testing.assert_close(module.parametrizations.weight.original.grad, expected[1])


class AllRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional_collectives.all_gather_tensor_autograd(x, 0, dist.group.WORLD)


def check_a_value_that_one_rank_keeps_or_writes() -> None:
    def counted(forward: Any, layer: nn.Module, x: Tensor) -> tuple[dict[str, int], Any]:
        torch.compiler.reset()
        compiled = torch.compile(forward, backend=fxparam.backend("aot_eager"), fullgraph=True)
        compiled(layer, x).sum().backward()
        found = one_step(
            layer, lambda: compiled(layer, x).square().sum().backward(), "plain", check=False
        ).collectives
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        forward(layer, x).square().sum().backward()
        expected = [p.grad for p in layer.parameters() if p.grad is not None]
        torch.testing.assert_close(grads, expected)
        return found, layer

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        for step in range(3):
            w = layer.weight
            if dist.get_rank() == 0 and step == 0:
                layer.kept = w.detach()  # type: ignore[assignment]
            if dist.get_rank() == 0 and step == 1 and "parametrizations" in layer._modules:
                w.detach().mul_(2)  # of a DTensor's torch refuses it
            x = torch.tanh(x @ w)
        return x

    x = torch.ones(2, WIDTH)
    layer = nn.Linear(WIDTH, WIDTH // dist.get_world_size(), bias=False)
    fxparam.register_parametrization(layer, "weight", AllRows(), unsafe=True)
    assert counted(forward, layer, x)[0] == {"all_gather": 1, "all_reduce": 1}
    if _UNDERSTOOD:
        sharded = _gathering(nn.Linear(WIDTH, WIDTH, bias=False))
        assert counted(forward, sharded, x)[0] == {"all_gather": 1, "all_reduce": 1}


def check_writes_to_local_tensors() -> None:
    """A copy of what a collective gave must not part two views of one memory, nor an input's."""

    def to_an_input(p: Any) -> Tensor:
        p.to_local().add_(1)
        return p.to_local().sum()

    def through_another_view(p: Any) -> Tensor:
        whole = p.redistribute(placements=[Replicate()])
        one, other = whole.to_local(), whole.to_local()
        one.mul_(2)
        return other.sum() + p.redistribute(placements=[Replicate()]).to_local().sum()

    for function in (to_an_input, through_another_view):
        for placement in (Shard(0), Replicate()):
            results = []
            for run in (function, torch.compile(function, backend=fxparam.backend("aot_eager"))):
                p = nn.Parameter(distribute_tensor(torch.ones(4, 4), _mesh(), [placement]))
                with torch.no_grad():
                    results.append((run(p), p.to_local().clone()))
            torch.testing.assert_close(*results)


def check_ranks_may_compile_anew_alone() -> None:
    compiled = torch.compile(
        Rows(8), backend=fxparam.backend("aot_eager", check_ranks=True), fullgraph=True
    )
    compiled(batch())
    compiled(torch.cat([batch()] * (dist.get_rank() + 1)))


def check_ranks_that_differ_raise() -> None:
    check_ranks._SECONDS = 5
    module = Rows(8)

    def run(x: Tensor) -> Tensor:
        x = x @ module.weight.mT
        if dist.get_rank() == 0:
            torch._dynamo.graph_break()
        return x @ module.weight

    message = ""
    try:
        torch.compile(run, backend=fxparam.backend("aot_eager", check_ranks=True))(batch())
    except Exception as error:
        message = str(error)
    assert "Ranks would run other collectives" in message, message
    assert "evaluated 2 times, now 1" in message, message
    dist.barrier()


class _StopError(Exception):
    """Raised in place of compiling: nothing is run that ranks would wait for."""


def _compiled_in_turn(forward: Any, layer: nn.Module) -> list[str]:
    """Compile on one rank after the other; return the errors of all."""

    def stop(gm: Any, inputs: Any) -> Any:
        raise _StopError

    error = ""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            torch.compiler.reset()
            try:
                torch.compile(forward, backend=fxparam.backend(stop))(layer, torch.ones(2, WIDTH))
            except Exception as raised:
                error = str(raised.__cause__ or raised)
        dist.barrier()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, error)
    return found


def check_a_rank_that_comes_later_with_another_plan_raises() -> None:
    layer = nn.Linear(WIDTH, WIDTH // dist.get_world_size(), bias=False)
    fxparam.register_parametrization(layer, "weight", AllRows(), unsafe=True)

    def more_on_one(layer: nn.Module, x: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            x = functional_collectives.all_reduce(x, "sum", dist.group.WORLD)
        return x @ layer.weight @ layer.weight

    errors = _compiled_in_turn(more_on_one, layer)
    assert all("Ranks would run other collectives" in error for error in errors[1:]), errors
    assert "Ranks would" not in errors[0]

    def alike(layer: nn.Module, x: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            x = 2 * x
        return x @ layer.weight @ layer.weight

    assert not any("Ranks would" in error for error in _compiled_in_turn(alike, layer))


def check_a_graph_break_on_one_rank_raises() -> None:
    layer = nn.Linear(WIDTH, WIDTH // dist.get_world_size(), bias=False)
    fxparam.register_parametrization(layer, "weight", AllRows(), unsafe=True)
    errors, text = [], ""

    def broken(layer: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(x @ layer.weight)
        if dist.get_rank() == 0:
            torch._dynamo.graph_break()
        return torch.tanh(x @ layer.weight)

    def without_waiting(gm: Any, inputs: Any) -> Any:
        return lambda *_: [torch.ones(2, WIDTH)]

    torch.compiler.reset()
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            compiled = torch.compile(broken, backend=fxparam.backend(without_waiting))
            try:
                compiled(layer, torch.ones(2, WIDTH))
            except Exception as raised:
                text = str(raised.__cause__ or raised)
        dist.barrier()
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, text)
    assert "behind a graph break" in "".join(errors), errors


def check_graph_breaks_on_one_rank_that_change_nothing() -> None:
    """Each parameter is read once: ranks run the same collectives, in more or in fewer graphs."""
    if not _UNDERSTOOD:
        return
    shards = [distribute_tensor(torch.randn(WIDTH, WIDTH), _mesh(), [Shard(0)]) for _ in range(4)]

    def read(i: int) -> Tensor:
        return shards[i].redistribute(placements=[Replicate()]).to_local()

    def one(x: Tensor) -> Tensor:
        x = torch.tanh(x @ read(0))
        if dist.get_rank() == 0:
            torch._dynamo.graph_break()
        return torch.tanh(x @ read(1))

    def two(x: Tensor) -> Tensor:
        x = torch.tanh(x @ read(0))
        if dist.get_rank() == 0:
            torch._dynamo.graph_break()
        x = torch.tanh(x @ read(1))
        if dist.get_rank() == 0:
            torch._dynamo.graph_break()
        return torch.tanh(x @ read(2)) @ read(3)

    for function in (one, two, one):
        torch.compiler.reset()
        compiled = torch.compile(function, backend=fxparam.backend("aot_eager"))
        torch.testing.assert_close(compiled(batch()), function(batch()))


def check_a_buffer_that_one_rank_may_write_alone() -> None:
    class Scaled(AllRows):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    layer = nn.Linear(WIDTH, WIDTH // dist.get_world_size(), bias=False)
    fxparam.register_parametrization(layer, "weight", Scaled(), unsafe=True)
    compiled = torch.compile(
        lambda x: x @ layer.weight, backend=fxparam.backend("aot_eager"), fullgraph=True
    )
    x = torch.ones(2, WIDTH)
    with fxparam.cached():
        compiled(x)
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(2)  # as an optimizer does
        torch.testing.assert_close(compiled(x), x @ layer.weight)
        layer.parametrizations.weight[0].scale.mul_(2)
        with pytest.raises(RuntimeError, match="ranks compute together"):
            compiled(x)
    torch.testing.assert_close(compiled(x), x @ layer.weight)


def check_a_buffer_that_one_rank_may_write_alone_in_eager_code() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    layer = _sharded(nn.Linear(WIDTH, WIDTH, bias=False))
    fxparam.register_parametrization(layer, "weight", Scaled())
    with fxparam.cached():
        layer(batch())
        layer.eval()
        layer(batch())  # modes are alike on all ranks
        layer.parametrizations.weight[1].scale.mul_(2)
        with pytest.raises(RuntimeError, match="ranks compute together"):
            layer(batch())
