"""``cached()`` around compiled code and inside it: the results are those of eager ``cached()``.

Code compiled by other backends: a region keeps its values outside graphs, so that a graph breaks
where it reads one. Outside a region nothing of this is in the graph.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recurrent(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], Any], *, region: bool) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4, dtype=torch.float64)
        wrap(self.cell)
        self.region = region

    def run(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x * self.cell.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        if self.region:
            with ours.cached():
                return self.run(x)
        return self.run(x)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "symmetric": lambda m: ours.register_parametrization(m, "weight", zoo.Symmetric()),
    "spectral norm": lambda m: ours.adopt(spectral_norm(m)),
    "steps": lambda m: ours.register_parametrization(m, "weight", zoo.Steps(), unsafe=True),
}


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    model.zero_grad()
    out = run(x)
    out.sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("place", ["inside", "around", "around two calls"])
def test_results_are_those_of_eager(backend: str, wrap: str, place: str) -> None:
    model = Recurrent(WRAPS[wrap], region=place == "inside")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend)

    def runner(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with ours.cached():
                return call(x) + call(2 * x) if place == "around two calls" else call(x)

        return call if place == "inside" else run

    for _ in range(2):
        x = torch.randn(2, 4, dtype=torch.float64)
        expected, actual = step(model, runner(model), x), step(twin, runner(compiled), x)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_between_two_calls_is_seen(backend: str) -> None:
    model = Recurrent(WRAPS["symmetric"], region=False)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 4, dtype=torch.float64)
    with ours.cached(), torch.no_grad():
        for _ in range(3):
            assert_close(compiled(x), model(x))
            model.cell.parametrizations.weight.original.mul_(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_knows_the_region_of_its_thread(backend: str) -> None:
    """Compiled outside and then called inside, in another thread, and outside again."""
    model = Recurrent(WRAPS["steps"], region=False)
    count = model.cell.parametrizations.weight[0].count
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 4, dtype=torch.float64)

    def evaluations() -> float:
        before = count.item()
        compiled(x)
        return count.item() - before

    seen: list[float] = []
    assert evaluations() == 4
    with ours.cached():
        assert evaluations() == 1
        thread = threading.Thread(target=lambda: seen.append(evaluations()))
        thread.start()
        thread.join()
    assert seen == [4] and evaluations() == 4


def test_outside_a_region_the_graph_is_whole() -> None:
    model = Recurrent(WRAPS["spectral norm"], region=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    assert_close(compiled(x), twin(x))


def test_a_region_in_a_full_graph_says_why_not() -> None:
    model = Recurrent(WRAPS["symmetric"], region=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with ours.cached(), pytest.raises(RuntimeError, match="region are kept outside compiled"):
        compiled(torch.randn(2, 4, dtype=torch.float64))


def test_nodes_carry_the_list_in_their_module_stack() -> None:
    stacks: list[Any] = []

    def record(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        stacks.extend(n.meta["nn_module_stack"] for n in gm.graph.nodes if n.target == "triu")
        return gm

    layer = zoo.linear()
    ours.register_parametrization(layer, "weight", zoo.Symmetric())
    torch.compile(layer, backend=record, fullgraph=True)(torch.ones(1, 3))
    assert stacks
    for stack in stacks:
        assert ours.ParametrizationList in [cls for _, cls in stack.values()]
