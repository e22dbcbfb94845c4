"""``fxparam.hoist``: graphs of other captures, and what a run on fake tensors tells and leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn.utils import parametrize
from torch.testing import assert_close

import fxparam
from tests import helpers, zoo

E = torch.matrix_exp


def _reads_data(x: Tensor) -> Tensor:
    return x * float(x.sum() > 0)


torch.fx.wrap("_reads_data")


class _Model(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.p, x)


def _masked(p: Tensor, x: Tensor) -> Tensor:
    y = E(p) @ x
    return E(p) @ y + x[x > 0].sum()


def _a_number(p: Tensor, x: Tensor) -> Tensor:
    y = E(p) @ x
    return E(p) @ y * x.sum().item()


def _opaque(p: Tensor, x: Tensor) -> Tensor:
    return E(p) @ _reads_data(E(p) @ x)


def _in_autocast(p: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x * x[x > 0].sum()
    return E(p) @ (E(p) @ y)


@pytest.mark.parametrize(
    ("body", "left"), [(_masked, 1), (_a_number, 1), (_opaque, 2), (_in_autocast, 1)]
)
def test_what_reads_data_is_not_run(body: Any, left: int) -> None:
    model, x = _Model(body), torch.randn(3, dtype=torch.float64)
    gm = torch.fx.symbolic_trace(model)
    for _ in range(2):
        fxparam.hoist(gm, (x,))
        assert not torch.is_autocast_enabled("cpu")
        gm.graph.lint()
        assert sum(node.target is E for node in gm.graph.nodes) == left
        expected, actual = model(x), gm(x)
        assert_close(actual, expected)
        grads = [torch.autograd.grad(y.sum(), m.p) for y, m in ((expected, model), (actual, gm))]
        assert_close(*grads)


def test_too_few_example_inputs() -> None:
    gm = torch.fx.symbolic_trace(_Model(_masked))
    with pytest.raises(RuntimeError, match="positional argument"):
        fxparam.hoist(gm, ())


def test_metadata_are_of_the_time_of_each_node() -> None:
    """What ``contiguous`` gives is ``w`` itself, until ``w`` is transposed."""
    graph = Graph()
    x, p = graph.placeholder("x"), graph.get_attr("p")
    w = graph.call_method("clone", (p,))
    a = graph.call_function(E, (w,))
    graph.call_method("mul_", (graph.call_method("contiguous", (w,)), 2.0))
    b = graph.call_function(E, (w,))
    graph.call_method("t_", (w,))
    left, right = (graph.call_function(torch.matmul, (e, x)) for e in (a, b))
    graph.output(graph.call_function(torch.sub, (left, right)))
    gm = GraphModule({"p": nn.Parameter(torch.randn(3, 3, dtype=torch.float64))}, graph)
    given = torch.randn(3, dtype=torch.float64)
    with torch.no_grad():
        expected = gm(given)
        assert not fxparam.hoist(gm, (given,)).modified
        assert_close(gm(given), expected)


def test_metadata_of_parameters_and_views() -> None:
    gm = torch.fx.symbolic_trace(_Model(lambda p, x: p.mT @ x + p[0]))
    x = torch.randn(3, dtype=torch.float64)
    fxparam.hoist(gm, (x,))
    val = {node.target: node.meta["val"] for node in gm.graph.nodes if node.op != "output"}
    read = val["p"]
    assert isinstance(read, nn.Parameter) and read.requires_grad and not val["x"].requires_grad
    views = [v for v in val.values() if v.untyped_storage()._cdata == read.untyped_storage()._cdata]
    assert len(views) == 3 and all(view.requires_grad for view in views)


class _Remembers(nn.Linear):
    """A leaf that keeps what it computes, in every way that modules do."""

    def __init__(self) -> None:
        super().__init__(3, 3, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.calls, self.outputs = 0, []

    def forward(self, input: Tensor) -> Tensor:
        self.last = super().forward(input)
        self.calls += 1
        self.outputs.append(self.last)
        self.mean = self.last.mean(0).detach()
        return self.last


class _Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def test_modules_keep_nothing_of_the_run() -> None:
    model = nn.Sequential(_Remembers(), torch.nn.utils.parametrizations.weight_norm(_Remembers()))
    gm = GraphModule(model, _Leaves().trace(model))
    before = [dict(vars(module)) for module in model.modules()]
    buffers = [buffer for module in model.modules() for buffer in module._buffers.values()]
    fxparam.hoist(gm, (torch.randn(2, 3, dtype=torch.float64),))
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert vars(module).get("outputs", []) == []
    after = [buffer for module in model.modules() for buffer in module._buffers.values()]
    assert all(a is b for a, b in zip(after, buffers, strict=True))


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class _CountsIsLeaf(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.BatchNorm1d, _Counts))


def test_modules_do_not_count_the_run() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), _Counts())
    gm = GraphModule(model, _CountsIsLeaf().trace(model))
    fxparam.hoist(gm, (torch.randn(2, 3),))
    assert model[0].num_batches_tracked == 0 and model[1].calls == 0


_HELD: list[Tensor] = []


def _fetch(x: Tensor) -> Tensor:
    return _HELD[0]


torch.fx.wrap("_fetch")


class _WritesWhatItFetches(_Model):
    def forward(self, x: Tensor) -> Tensor:
        found = _fetch(x)
        y = E(self.p) @ x
        found.mul_(0.5)
        return E(self.p) @ y


class _WritesItsInput(_Model):
    def forward(self, given: Tensor, x: Tensor) -> Tensor:
        y = E(self.p) @ x
        given.mul_(0.5)
        return E(self.p) @ y


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "example inputs"])
@pytest.mark.parametrize("kind", [_WritesWhatItFetches, _WritesItsInput])
def test_an_original_may_be_written_under_another_name(kind: type[_Model], known: bool) -> None:
    model, x = kind(None).requires_grad_(False), torch.randn(3, 3, dtype=torch.float64)
    start = model.p.clone()
    _HELD[:] = [model.p]
    given = (model.p, x) if kind is _WritesItsInput else (x,)
    expected = model(*given)
    model.p.copy_(start)
    gm = torch.fx.symbolic_trace(model)
    fxparam.hoist(gm, given if known else None)
    model.p.copy_(start)
    assert_close(gm(*given), expected)


def _counting(m: nn.Module) -> None:
    for step in (zoo.Double(), helpers.MatrixExponential(), helpers.Counting()):
        parametrize.register_parametrization(m, "weight", step)


class TestHoist:
    """The pass on graphs of other captures."""

    def test_of_torch_fx(self) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p = nn.Parameter(torch.randn(3, 3))

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(3):
                    x = torch.ops.fxparam_test.count(self.p) @ x
                return x

        gm, x = torch.fx.symbolic_trace(Plain()), torch.randn(3)
        assert not fxparam.hoist(gm).modified  # a matrix product may be of anything
        result = fxparam.hoist(gm, (x,))
        assert result.modified and not fxparam.hoist(gm, (x,)).modified
        assert helpers.counted(lambda: gm(x).sum().backward()) == (1, 1)
        assert result.report.merged == 2

    def test_of_make_fx(self) -> None:
        model, x = helpers.Loop(_counting), torch.randn(2, 5, dtype=torch.float64)
        params = dict(model.named_parameters())

        def call(params: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, params, (x,))

        gm = torch.fx.experimental.proxy_tensor.make_fx(call)(params, x)
        gm.graph.lint()
        result = fxparam.hoist(gm)
        gm.recompile()
        torch.testing.assert_close(gm(params, x), model(x))
        assert not result.modified or helpers.counted(lambda: gm(params, x))[0] == 1

    def test_of_export(self) -> None:
        model, x = helpers.Loop(_counting), torch.randn(2, 5, dtype=torch.float64)
        program = torch.export.export(model, (x,))
        result = fxparam.hoist(program.graph_module)
        assert result.modified
        assert helpers.counted(lambda: program.module()(x))[0] == 1
        (entry,) = result.report.entries
        assert (entry.name, entry.accesses, entry.evaluations) == ("cell.weight", 6, 1)
