"""``torch.compiler.nested_compile_region``: options reach the inner backend, few variants."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxparam
from fxparam._torch.dynamo import lookup_backend
from tests import helpers

LAYERS = 12  # torch makes 8 variants of a region at most


def _options() -> Any:
    module = pytest.importorskip("torch._higher_order_ops.invoke_subgraph")
    if not hasattr(torch._dynamo.config, "enable_invoke_subgraph_regional_compile"):
        pytest.skip("this torch has no options of regions")
    return module.get_invoke_subgraph_compile_options()


class Stack(nn.Module):
    """Layers with a weight each, which is read twice in a region."""

    def __init__(self, options: Any, cached: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(LAYERS))
        for layer in self.layers:
            fxparam.register_parametrization(layer, "weight", helpers.Counting())
        given = {} if options is None else {"options": options}
        self.region = torch.compiler.nested_compile_region(**given)(lambda m, x: m(m(x)).tanh())
        self.cached = fxparam.cached if cached else contextlib.nullcontext

    def forward(self, x: Tensor) -> Tensor:
        with self.cached():
            for layer in self.layers:
                x = self.region(layer, x)
        return x


def _calls(gm: GraphModule) -> list[torch.fx.Node]:
    kind = torch.ops.higher_order.invoke_subgraph
    return list(gm.graph.find_nodes(op="call_function", target=kind))


def _bodies(gm: GraphModule) -> list[GraphModule]:
    return [m for m in gm.modules() if isinstance(m, GraphModule) and m is not gm]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("with_options", [False, True])
def test_options_survive_and_layers_have_one_region(with_options: bool, cached: bool) -> None:
    options = _options() if with_options else None
    settings = {"enable_invoke_subgraph_regional_compile": True} if with_options else {}
    seen: list[GraphModule] = []

    def inner(gm: GraphModule, inputs: Any) -> Any:
        seen.append(copy.copy(gm))
        return lookup_backend("aot_eager")(gm, inputs)

    with torch._dynamo.config.patch(settings):
        model = Stack(options, cached)
        x = torch.randn(2, 4, dtype=torch.float64)
        helpers.check_against_eager(model, fxparam.backend(inner), x, fullgraph=True)
        compiled = torch.compile(model, backend=fxparam.backend(inner), fullgraph=True)
        compiled(x)
    assert helpers.counted(lambda: compiled(x).sum().backward()) == (LAYERS, LAYERS)
    for gm in seen:
        assert len(_bodies(gm)) <= 2  # the first layer's input has no gradient
        for held in (*_calls(gm), *_bodies(gm)) if with_options else ():
            custom = held.meta if isinstance(held, GraphModule) else held.meta["custom"]
            assert custom["nested_region_config"] is options
