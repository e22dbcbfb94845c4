"""One class for each (original class, parametrized names), which no instance can spoil."""

from __future__ import annotations

import abc
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn
from torch.testing import assert_close

import fxparam.parametrize as ours
from tests import zoo


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parametrized(*names: str, cls: Any = nn.Linear, api: Any = ours) -> Any:
    module = cls(3, 3)
    for name in names or ("weight",):
        api.register_parametrization(module, name, zoo.Double())
    return module


class Plan(abc.ABC):
    @abc.abstractmethod
    def plan(self) -> int: ...


class Abstract(nn.Linear, Plan):
    def plan(self) -> int:
        return 3


# --- identity ---------------------------------------------------------------------------------


def test_equal_modules_have_one_class() -> None:
    assert type(parametrized()) is type(parametrized())
    assert type(parametrized(api=torch_parametrize)) is not type(
        parametrized(api=torch_parametrize)
    )
    both = type(parametrized("weight", "bias"))
    assert both is type(parametrized("bias", "weight"))
    assert both is not type(parametrized("weight"))
    assert type(parametrized(cls=Abstract)) is not type(parametrized())


def test_the_class_is_made_like_torch_makes_its_own() -> None:
    mine, theirs = type(parametrized()), type(parametrized(api=torch_parametrize))
    assert mine.__name__ == theirs.__name__ == "ParametrizedLinear"
    assert mine.__bases__ == theirs.__bases__ == (nn.Linear,)
    assert repr(parametrized()) == repr(parametrized(api=torch_parametrize))


def test_a_metaclass_is_kept() -> None:
    module = parametrized(cls=Abstract)
    assert isinstance(type(module), abc.ABCMeta) and isinstance(module, Plan)
    assert module.plan() == 3
    assert type(module) is type(parametrized(cls=Abstract))


def test_a_class_goes_when_nothing_needs_it() -> None:
    def make() -> weakref.ref[type]:
        class Local(nn.Linear):
            pass

        module = parametrized(cls=Local)
        ours.remove_parametrizations(module, "weight")
        return weakref.ref(Local)

    reference = make()
    gc.collect()  # the class made from it ...
    gc.collect()  # ... which kept it alive
    assert reference() is None


def test_removal_moves_the_instance_alone() -> None:
    stays, leaves = parametrized("weight", "bias"), parametrized("weight", "bias")
    ours.remove_parametrizations(leaves, "weight")
    assert type(leaves) is type(parametrized("bias"))
    assert stays.weight.grad_fn is not None and leaves.weight.is_leaf
    assert type(stays) is type(parametrized("weight", "bias"))


# --- torch's functions, which change a module's class -----------------------------------------


def test_torch_removes_from_one_of_two() -> None:
    stays, leaves = parametrized(), parametrized()
    weight = leaves.parametrizations.weight.original
    torch_parametrize.remove_parametrizations(leaves, "weight")
    assert type(leaves) is nn.Linear and leaves.weight is weight
    assert_close(stays.weight, 2 * stays.parametrizations.weight.original)
    assert_close(parametrized().weight.shape, (3, 3))


def test_torch_removes_one_of_two_tensors() -> None:
    stays, leaves = parametrized("weight", "bias"), parametrized("weight", "bias")
    torch_parametrize.remove_parametrizations(leaves, "weight")
    assert leaves.weight is leaves._parameters["weight"] and "weight" in leaves.state_dict()
    assert stays.weight.grad_fn is not None
    leaves.weight = nn.Parameter(torch.eye(3))
    assert_close(leaves(torch.zeros(1, 3)), leaves.bias[None])
    with pytest.raises(TypeError, match="cannot assign"):
        leaves.weight = torch.eye(3)
    del leaves.weight
    assert not hasattr(leaves, "weight") and stays.weight.grad_fn is not None
    leaves.weight = torch.eye(3)  # a plain attribute now, as on any module
    assert leaves.weight is leaves.__dict__["weight"]
    ours.remove_parametrizations(leaves, "bias")
    assert type(leaves) is nn.Linear


def test_such_an_instance_still_compiles_in_one_graph() -> None:
    module = parametrized("weight", "bias")
    torch_parametrize.remove_parametrizations(module, "weight")
    x = torch.randn(2, 3)
    assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


def test_torch_registers_beside_ours() -> None:
    mine, sibling = parametrized("weight"), parametrized("weight")
    torch_parametrize.register_parametrization(mine, "bias", zoo.Double())
    assert_close(mine.bias, 2 * mine.parametrizations.bias.original)
    assert sibling.bias is sibling._parameters["bias"]
    with ours.cached():
        assert mine.bias is mine.bias and mine.weight is mine.weight
    sibling.bias = nn.Parameter(torch.ones(3))
    torch_parametrize.remove_parametrizations(mine, "bias")
    ours.remove_parametrizations(mine, "weight")
    assert type(mine) is nn.Linear


def test_ours_registers_beside_torch() -> None:
    module = parametrized("weight", api=torch_parametrize)
    ours.register_parametrization(module, "bias", zoo.Double())
    assert type(module) is type(parametrized("weight", "bias"))
    assert_close(module.weight, 2 * module.parametrizations.weight.original)
    torch_parametrize.remove_parametrizations(module, "weight")
    torch_parametrize.remove_parametrizations(module, "bias")
    assert type(module) is nn.Linear


def test_ours_appends_to_torch_and_torch_to_ours() -> None:
    for first, second in ((ours, torch_parametrize), (torch_parametrize, ours)):
        module = parametrized("weight", api=first)
        second.register_parametrization(module, "weight", zoo.Double())
        assert len(module.parametrizations.weight) == 2
        assert_close(module.weight, 4 * module.parametrizations.weight.original)
        module.weight = torch.ones(3, 3)
        assert_close(module.weight.detach(), torch.ones(3, 3))


def test_a_class_put_on_top() -> None:
    """As FSDP does: the instance keeps it, and its tensors come and go below."""
    module = parametrized("weight")
    below = type(module)
    module.__class__ = type("Sharded", (zoo.Identity, below), {"forward": nn.Linear.forward})
    assert ours.type_before_parametrizations(module) is nn.Linear
    ours.register_parametrization(module, "bias", zoo.Double())
    assert isinstance(module, zoo.Identity) and module.bias.grad_fn is not None
    ours.remove_parametrizations(module, "weight")
    assert module.weight.is_leaf and module.bias.grad_fn is not None
    ours.remove_parametrizations(module, "bias")
    assert type(module).__name__ == "Sharded" and module.bias.is_leaf


def test_an_attribute_set_on_the_class_is_set() -> None:
    module = parametrized()
    type(module).note = "set"
    try:
        assert module.note == "set"
    finally:
        del type(module).note
    assert not hasattr(module, "note")


# --- what it is for ---------------------------------------------------------------------------


class Layer(nn.Linear):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def recorded(run: Any) -> list[torch.fx.GraphModule]:
    graphs: list[torch.fx.GraphModule] = []

    def record(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    run(record)
    return graphs


@pytest.mark.parametrize(("api", "graphs"), [(ours, 1), (torch_parametrize, 20)])
def test_one_compiled_function_serves_twenty_equal_modules(api: Any, graphs: int) -> None:
    blocks = [parametrized(api=api) for _ in range(20)]
    x = torch.randn(2, 3)

    def run(backend: Any) -> None:
        apply = torch.compile(lambda block, x: block(x), backend=backend)
        for block in blocks:
            assert_close(apply(block, x), block(x))

    with torch._dynamo.config.patch(recompile_limit=64):
        assert len(recorded(run)) == graphs


def regions(model: nn.Module) -> tuple[int, int]:
    """How many subgraphs a model's compiled graph calls, and how often."""
    x = torch.randn(2, 3)
    (graph,) = recorded(
        lambda backend: assert_close(
            torch.compile(model, backend=backend, fullgraph=True)(x), model(x)
        )
    )
    calls = [n.args[0].target for n in graph.graph.nodes if n.target is not None
             and n.op == "call_function" and "invoke_subgraph" in str(n.target)]  # fmt: skip
    return len(set(calls)), len(calls)


def test_twenty_regions_are_one_subgraph() -> None:
    subgraphs, calls = regions(nn.Sequential(*(parametrized(cls=Layer) for _ in range(20))))
    assert calls >= 19 and subgraphs <= calls - 18


def test_twenty_regions_with_torch() -> None:
    """torch's class of its own for each module makes every region trace anew, up to a limit."""
    model = nn.Sequential(*(parametrized(cls=Layer, api=torch_parametrize) for _ in range(20)))
    if torch.__version__ < "2.12":
        pytest.skip("regions are traced each time whatever the class, in this version")
    with pytest.raises(Exception, match="maximum reuse entries"):
        regions(model)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_torchs_removers_of_hooks_name_the_right_function(norm: str) -> None:
    wrap = getattr(nn.utils.parametrizations, norm)
    for layer in (ours.adopt(wrap(nn.Conv1d(2, 3, 2))), ours.adopt(wrap(nn.Linear(2, 2)))):
        assert "remove_parametrizations" not in str(layer) + repr(layer)
        before = zoo.everything(layer)
        with pytest.raises(ValueError, match=r"fxparam.remove_parametrizations: \['weight'\]"):
            getattr(nn.utils, f"remove_{norm}")(layer)
        assert zoo.everything(layer) == before
        ours.remove_parametrizations(layer, "weight")
        assert f"{layer}" == str(layer)
