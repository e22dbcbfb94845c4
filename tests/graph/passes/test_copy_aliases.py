"""Calls of higher-order ops one of whose operands is a shared value, beside itself."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils.parametrize import register_parametrization

import fxparam
from fxparam.graph.passes.copy_aliases import copy_aliases
from tests import helpers
from tests.fuzz.pieces import cond
from tests.graph.sketch import Sketch, levels, picture, text


class _Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ x)  # whose result is not needed in backward


class _Pair(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(5, 5, dtype=torch.float64) for _ in range(2))
        for layer in (self.a, self.b):
            register_parametrization(layer, "weight", _Squash())
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def _compare(body: Callable[..., Any], *, train: bool, inner: str = "aot_eager") -> Any:
    torch.compiler.reset()
    model = fxparam.adopt(_Pair(body))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 5, dtype=torch.float64)
    fx = fxparam.backend(inner)
    with torch.set_grad_enabled(train):
        expected, actual = model(x), torch.compile(twin, backend=fx)(x)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        if train:
            expected.square().sum().backward()
            actual.square().sum().backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-11)
    (report,) = fx.reports
    assert report.merged > 0
    return report


def _region(m: _Pair) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compiler.nested_compile_region(lambda x, w: torch.tanh(x @ w + m.a(x)))


def _one_after_the_other(m: _Pair, x: Tensor) -> Tensor:
    g = _region(m)
    return g(g(x, m.a.weight), m.b.weight)


def _there_and_back(m: _Pair, x: Tensor) -> Tensor:
    g = _region(m)
    return g(g(g(x, m.a.weight), m.b.weight), m.a.weight)


def _nothing_moves(m: _Pair, x: Tensor) -> Tensor:
    g = torch.compiler.nested_compile_region(lambda x, w, v: torch.tanh(x @ w + x @ v * 2))
    return g(g(x, m.a.weight, m.a.weight), m.a.weight, m.b.weight)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("body", [_one_after_the_other, _there_and_back, _nothing_moves])
def test_a_region_that_is_given_what_it_reads(body: Callable[..., Any], train: bool) -> None:
    _compare(body, train=train)


def test_a_region_that_is_given_what_it_reads_by_inductor() -> None:
    _compare(_one_after_the_other, train=False, inner="inductor")


def _steps() -> Tensor:
    return torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(4, 3, 5)


def _scan_carry(m: _Pair, x: Tensor) -> Tensor:
    def step(carry: tuple[Tensor, Tensor], row: Tensor) -> Any:
        h, w = carry
        h = torch.tanh(h @ m.a.weight + h @ w + row)
        return (h + 0, w * 0.5), h * 2

    return scan(step, (x, m.a.weight), _steps())[1]


def _scan_row(m: _Pair, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> Any:
        return torch.tanh(h @ m.a.weight + row[0]) + 0, h * 2

    return scan(step, m.a.weight[0], _steps())[1] + x.sum()


def _scan_carried_twice(m: _Pair, x: Tensor) -> Tensor:
    def step(carry: tuple[Tensor, Tensor, Tensor], row: Tensor) -> Any:
        h, w, v = carry
        return (torch.tanh(h @ v + h @ w + row), w * 0.5, v * 0.3), h * 2

    return scan(step, (x, m.a.weight, m.a.weight), _steps())[1]


def _cond_view(m: _Pair, x: Tensor) -> Tensor:
    return torch.cond(
        x.sum() > 0,
        lambda x, w: x @ w + m.a(x),
        lambda x, w: x @ w - m.a(x),
        (x, m.a.weight.T),
    )


def _while_carry(m: _Pair, x: Tensor) -> Tensor:
    def step(i: Tensor, h: Tensor, w: Tensor) -> Any:
        return i + 1, torch.tanh(h @ m.a.weight + h @ w), w * 0.5

    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda i, h, w: i < 3, step, (start, x.clone(), m.a.weight))[1]


def _region_in_a_scan(m: _Pair, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> Any:
        h = _given(m, _given(m, h + row, m.a.weight), m.b.weight)
        return h + 0, h * 2

    return scan(step, x, _steps())[1]


@torch.compiler.nested_compile_region
def _given(m: _Pair, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w + m.a(x))


@pytest.mark.parametrize(
    "body",
    [_region_in_a_scan, _scan_carry, _scan_row, _scan_carried_twice, _cond_view, _while_carry],
)
def test_a_loop_or_branch_that_is_given_what_it_reads(body: Callable[..., Any]) -> None:
    _compare(body, train=False)


@pytest.mark.parametrize("body", [_scan_carry, _cond_view])
def test_the_same_in_training(body: Callable[..., Any]) -> None:
    if body is _scan_carry:
        helpers.skip_unless_scans_train()
    _compare(body, train=True)


def _written_after_a_branch(m: _Pair, x: Tensor) -> Tensor:
    with fxparam.cached():
        read = (lambda x: x + m.a.weight[0]), (lambda x: x - m.a.weight[0])
        x = cond(x.sum() > 0, *read, x)  # neither branch needs the weight in backward
        m.a.weight.mul_(1.5)
        return m.a(x)


@pytest.mark.filterwarnings("ignore:the value of the parametrized tensor")
def test_a_value_that_is_written_once_a_branch_has_read_it() -> None:
    _compare(_written_after_a_branch, train=True)


def test_a_copy_is_no_evaluation() -> None:
    report = _compare(_scan_carry, train=False)
    (entry,) = report.entries
    assert (entry.accesses, entry.evaluations, entry.runs) == (2, 1, 1)


def test_hoisting_again_changes_nothing() -> None:
    model, graphs = _Pair(_there_and_back), []

    def keep(gm: Any, inputs: Any) -> Any:
        fxparam.hoist(gm, grad_enabled=True)
        graphs.append((gm, str(gm.graph), fxparam.hoist(gm, grad_enabled=True).modified))
        return gm

    torch.compile(model, backend=keep)(torch.randn(3, 5, dtype=torch.float64))
    ((gm, before, modified),) = graphs
    assert (str(gm.graph), modified) == (before, False)


def _twice_the_same(computed: bool) -> torch.fx.GraphModule:
    s = Sketch()
    p, x, xs = s.parameter(), s.input(), s.input("xs", 4, 3, 3)
    w = s.call(torch.matrix_exp, p) if computed else p
    b = Sketch(s)
    h, row, a, c = (b.like(n, t) for n, t in {"h": x, "row": x, "a": w, "c": w}.items())
    h = b.call(torch.add, b.call(torch.matmul, a, h), b.call(torch.matmul, c, row))
    body = s.attribute("body", b.returns(h, b.call(torch.tanh, h)))
    scan = s.note(torch.ops.higher_order.scan, body, [x], [xs], [w, w], value=(x, xs))
    return s.returns(s.call(operator.getitem, scan, 0), s.call(operator.getitem, scan, 1))


def test_the_second_of_two_operands_is_a_copy() -> None:
    def rewrite(gm: torch.fx.GraphModule) -> None:
        copy_aliases(levels(gm))

    clones = {"clone.default": (0, 1)}
    assert_expected_inline(
        picture(_twice_the_same(True), rewrite, **clones),
        """\
def forward(self, p, x, xs):
matrix_exp = torch.matrix_exp(p)
body = self.body
scan = scan(body, [x], [xs], [matrix_exp, matrix_exp])
getitem = scan[0]
getitem_1 = scan[1]
return (getitem, getitem_1)
def body(self, h, row, a, c):
matmul = torch.matmul(a, h)
matmul_1 = torch.matmul(c, row)
add = torch.add(matmul, matmul_1)
tanh = torch.tanh(add)
return (add, tanh)
---
def forward(self, p, x, xs):
matrix_exp = torch.matrix_exp(p)
body = self.body
clone_default = torch.ops.aten.clone.default(matrix_exp)
scan = scan(body, [x], [xs], [matrix_exp, clone_default])
getitem = scan[0]
getitem_1 = scan[1]
return (getitem, getitem_1)
def body(self, h, row, a, c):
matmul = torch.matmul(a, h)
matmul_1 = torch.matmul(c, row)
add = torch.add(matmul, matmul_1)
tanh = torch.tanh(add)
return (add, tanh)""",
    )


def test_what_is_not_computed_is_not_copied() -> None:
    gm = _twice_the_same(False)
    before = text(gm)
    assert copy_aliases(levels(gm)) == set()
    assert text(gm) == before
