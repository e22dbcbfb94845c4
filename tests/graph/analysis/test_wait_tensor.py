"""``wait_tensor`` returns the memory of its argument, and messages write; no schema says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxparam
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.schemas import may_alias, writes_nothing
from tests.graph.sketch import Sketch

funcol = pytest.importorskip("torch.distributed._functional_collectives")
# torch 2.13 renames the collectives.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    dist.destroy_process_group()


class Gather(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        gather = funcol.all_gather_tensor_autograd if grad else funcol.all_gather_tensor
        return gather(x, 0, dist.group.WORLD)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        fxparam.register_parametrization(self, "weight", Gather(), unsafe=True)


class Written(Model):
    """Writes to a value that it has read, and reads it anew."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight.mul_(3)
        return torch.tanh(x @ weight) @ self.weight


class Left(Model):
    """Returns a value, which its caller writes to."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight
        return torch.tanh(x @ weight) @ self.weight, weight.detach()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_gathered_value_that_is_written_is_not_shared(inner: str) -> None:
    model = Written()
    with torch.no_grad():
        expected = model(X)
        actual = torch.compile(model, backend=fxparam.backend(inner))(X)
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("one_rank")
def test_a_gathered_value_that_leaves_the_graph_is_not_shared() -> None:
    model = Left()
    grads = []
    for run in (model, torch.compile(model, backend=fxparam.backend("eager"))):
        model.zero_grad()
        out, left = run(X)
        left.zero_()
        out.square().sum().backward()
        grads += [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads[0], grads[1])


OPS = {"packet": "wait_tensor", "overload": "wait_tensor.default"}


@pytest.mark.parametrize("name", OPS.values(), ids=OPS)
def test_it_aliases_by_a_run_on_fakes_and_by_its_schema(name: str) -> None:
    op: Any = torch.ops._c10d_functional.wait_tensor
    s = Sketch()
    x = s.input()
    waited = s.call(op.default if name.endswith("default") else op, s.call(torch.exp, x))
    table = analyze(s.returns(s.call(torch.Tensor.add_, waited, 1)))
    computed = waited.args[0]
    assert table.of[waited].storages == table.of[computed].storages
    (written,) = waited.users
    assert table.of[written].writes == table.of[computed].storages
    assert may_alias(waited)


@pytest.mark.parametrize("name", ["isend", "irecv"])
def test_messages_write(name: str) -> None:
    op = getattr(torch.ops._c10d_functional, name, None)
    if op is None:
        pytest.skip("this torch has no functional messages")
    s = Sketch()
    x = s.input()
    sent = s.call(op.default, x, 0, 0, "group")
    table = analyze(s.returns(sent))
    assert table.of[sent].writes == table.of[x].storages
    assert not writes_nothing(sent)
