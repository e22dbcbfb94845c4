"""The six rules for motion out of bodies: for each, a value that moves and one that must not.

``matrix_exp`` is counted where it is left: in the outermost graph, and in bodies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import fxparam
from fxparam.graph import HoistResult, Rule, hoist
from tests import helpers

E = torch.matrix_exp


class _Module(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.q = nn.Parameter(self.p.detach().clone())
        self.register_buffer("b", torch.randn(3, 3, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _scan(step: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    def combine(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = step(h, row)
        return h + 0, h * 2

    return scan(combine, x[0], x, dim=0)[1]


def _moves(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: torch.tanh(E(m.p) @ h + row), x)


def _view_of_the_value(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: E(m.p).mT @ h + row, x)


def _suffix_stays(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: (E(m.p) * h.sum()).tanh() @ h + row, x)


def _of_the_carry(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: E(torch.tanh(m.p * h.sum())) @ h * 0.1 + row, x)


def _two_originals(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: E(m.p) @ (E(m.q) @ h) + row, x)


def _value_is_returned(m: _Module, x: Tensor) -> Tensor:
    def combine(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return h * 0.5 + row, E(m.p)

    return scan(combine, x[0], x, dim=0)[1]


def _value_is_written(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: E(m.p.detach()).mul_(2.0) @ h + row, x)


def _value_is_written_through_a_view(m: _Module, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> Tensor:
        w = E(m.p.detach())
        w[0].zero_()
        return w @ h + row

    return _scan(step, x)


def _no_grad_inside(m: _Module, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> Tensor:
        with torch.no_grad():
            w = E(m.p)
        return w @ h + E(m.p) @ row

    return _scan(step, x)


def _random(m: _Module, x: Tensor) -> Tensor:
    return torch_map(lambda row: E(nn.functional.dropout(m.p, 0.5)) @ row, x)


def _one_branch(m: _Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x @ E(m.p), lambda x: x * 2, (x,))


def _both_branches(m: _Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: E(m.p) @ x.mT, lambda x: E(m.p) @ x.mT * 2, (x,))


def _branches_differ(m: _Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: E(m.p) @ x.mT, lambda x: E(m.q) @ x.mT * 2, (x,))


def _one_branch_and_before(m: _Module, x: Tensor) -> Tensor:
    y = x @ E(m.p)
    return torch.cond(y.sum() > 0, lambda x: x @ E(m.p), lambda x: x * 2, (y,))


def _one_branch_and_before_but_detached(m: _Module, x: Tensor) -> Tensor:
    y = x @ E(m.p).detach()
    return torch.cond(y.sum() > 0, lambda x: x @ E(m.p), lambda x: x @ m.q, (y,))


def _detached_in_one_branch(m: _Module, x: Tensor) -> Tensor:
    def detached(x: Tensor) -> Tensor:
        return x @ E(m.p).detach() + m.q.sum()

    return torch.cond(x.sum() > 0, lambda x: x @ E(m.p) + m.q.sum(), detached, (x,))


def _detached(m: _Module, x: Tensor) -> Tensor:
    return _scan(lambda h, row: torch.tanh(E(m.p).detach() @ h + m.q @ row), x)


def _one_branch_and_before_but_written(m: _Module, x: Tensor) -> Tensor:
    y = x @ E(m.b)
    m.b.mul_(0.5)
    return torch.cond(y.sum() > 0, lambda x: x @ E(m.b), lambda x: x * 2, (y,))


def _checkpoint_once(m: _Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: E(m.p) @ x.mT, x, use_reentrant=False)


def _checkpoint_twice(m: _Module, x: Tensor) -> Tensor:
    y = checkpoint(lambda x: E(m.p) @ x.mT, x, use_reentrant=False)
    return checkpoint(lambda y: E(m.p) @ y, y, use_reentrant=False)


def _checkpoint_twice_but_written(m: _Module, x: Tensor) -> Tensor:
    y = checkpoint(lambda x: E(m.b) @ x.mT, x, use_reentrant=False)
    m.b.mul_(0.5)
    return checkpoint(lambda y: E(m.b) @ y, y, use_reentrant=False)


def _checkpoint_twice_and_written_after(m: _Module, x: Tensor) -> Tensor:
    # Backward, which runs the regions again, reads what is written here.
    with torch.no_grad():
        y = checkpoint(lambda x: E(m.b) @ x.mT, x, use_reentrant=False)
        y = checkpoint(lambda y: E(m.b) @ y, y, use_reentrant=False)
    m.b.mul_(0.5)
    return y * m.p.sum()


def _checkpoints_in_a_checkpoint_and_written_after(m: _Module, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return E(m.b) @ y

    def outer(y: Tensor) -> Tensor:
        y = checkpoint(inner, y, use_reentrant=False)
        return checkpoint(inner, y, use_reentrant=False)

    with torch.no_grad():
        y = checkpoint(outer, x.mT.contiguous(), use_reentrant=False)
    m.b.mul_(0.5)
    return y * m.p.sum()


def _checkpoint_under_no_grad(m: _Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = checkpoint(lambda x: E(m.p) @ x.mT, x, use_reentrant=False)
    return checkpoint(lambda y: E(m.p) @ y, y, use_reentrant=False)


def _factors(m: _Module, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> Tensor:
        q, r = torch.linalg.qr(E(m.p))
        return torch.tanh(q @ h + r @ row)

    return _scan(step, x)


def _parts_of_one_value(m: _Module, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> Tensor:
        first, rest = E(m.p).split([1, 2])
        return torch.tanh(first.sum() * h + rest.sum() * row)

    return _scan(step, x)


def _while(body: Callable[[Tensor], Tensor], x: Tensor, steps: int = 3) -> Tensor:
    def step(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, body(h)

    return while_loop(lambda i, h: i < steps, step, (torch.tensor(0), x))[1]


def _while_loop(m: _Module, x: Tensor) -> Tensor:
    return _while(lambda h: h @ E(m.b) * 0.1, x)


def _while_loop_of_no_trip(m: _Module, x: Tensor) -> Tensor:
    return _while(lambda h: h @ E(m.b) * 0.1, x, steps=0)


def _while_loop_that_might_raise(m: _Module, x: Tensor) -> Tensor:
    # The inverse of a matrix of zeros, which a loop of no trip never takes.
    return _while(lambda h: h @ torch.linalg.inv(E(m.b) * 0), x, steps=0)


def _while_loop_that_might_raise_on_the_way(m: _Module, x: Tensor) -> Tensor:
    return _while(lambda h: h @ (2 * torch.linalg.inv(E(m.b) * 0)), x, steps=0)


# What is left: in the outermost graph, in bodies; and the rule that kept what is in bodies.
CASES: dict[Callable[..., Any], tuple[int, int, Rule | None]] = {
    _moves: (1, 0, None),
    _view_of_the_value: (1, 0, None),
    _suffix_stays: (1, 0, None),
    _of_the_carry: (0, 1, None),
    _two_originals: (2, 0, None),
    _factors: (1, 0, None),
    _parts_of_one_value: (1, 0, None),
    _value_is_returned: (0, 1, Rule.VALUE_ESCAPES),
    _value_is_written: (0, 1, Rule.VALUE_WRITTEN),
    _value_is_written_through_a_view: (0, 1, Rule.VALUE_WRITTEN),
    _no_grad_inside: (1, 1, Rule.MODES_DIFFER),
    _random: (0, 1, None),
    _one_branch: (0, 1, Rule.MAY_NOT_RUN),
    _both_branches: (1, 0, None),
    _branches_differ: (0, 2, Rule.MAY_NOT_RUN),
    _one_branch_and_before: (1, 0, None),
    _one_branch_and_before_but_written: (1, 1, Rule.WRITTEN_AROUND),
    _one_branch_and_before_but_detached: (1, 1, Rule.NO_GRADIENT),
    _detached_in_one_branch: (0, 2, Rule.NO_GRADIENT),
    _detached: (1, 0, None),
    _checkpoint_once: (0, 1, Rule.ONE_USE),
    _checkpoint_twice: (1, 0, None),
    _checkpoint_twice_but_written: (0, 2, Rule.WRITTEN_AROUND),
    _checkpoint_twice_and_written_after: (0, 2, Rule.WRITTEN_AROUND),
    _checkpoints_in_a_checkpoint_and_written_after: (0, 2, Rule.WRITTEN_AROUND),
    _checkpoint_under_no_grad: (0, 2, Rule.ONE_USE),
}
INFERENCE: dict[Callable[..., Any], tuple[int, int, Rule | None]] = {
    _while_loop: (1, 0, None),
    _while_loop_of_no_trip: (1, 0, None),
    _while_loop_that_might_raise: (1, 0, Rule.MAY_NOT_RUN),
    _while_loop_that_might_raise_on_the_way: (1, 0, Rule.MAY_NOT_RUN),
}


def _graphs(gm: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    return [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]


def _run(body: Callable[..., Any], train: bool) -> tuple[torch.fx.GraphModule, HoistResult]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = _Module(body)
    twin = copy.deepcopy(model)
    results: list[HoistResult] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        results.append(hoist(gm, grad_enabled=torch.is_grad_enabled()))
        assert not hoist(gm, grad_enabled=torch.is_grad_enabled()).modified
        for graph in _graphs(gm):
            graph.graph.lint()
        return gm

    x = torch.randn(4, 3, dtype=torch.float64)
    outputs = []
    for call in (model, torch.compile(twin, backend=keep)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(train):
            out = call(x)
        if out.requires_grad:
            out.square().sum().backward()
        outputs.append(out)
    torch.testing.assert_close(outputs[1], outputs[0])
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # What a body does not use it gives a gradient of zeros, or none.
        expected, actual = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q))
        torch.testing.assert_close(actual, expected, msg=name)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=name)
    (result,) = results
    return result.graph_module, result


def _left(gm: torch.fx.GraphModule) -> tuple[int, int]:
    counts = [sum(n.target is E for n in graph.graph.nodes) for graph in _graphs(gm)]
    return counts[0], sum(counts[1:])


@pytest.mark.parametrize("body", [*CASES, *INFERENCE], ids=lambda body: body.__name__)
def test_evaluations_left(body: Callable[..., Any]) -> None:
    train = body in CASES
    outside, inside, _ = (CASES if train else INFERENCE)[body]
    gm, _ = _run(body, train)
    assert _left(gm) == (outside, inside)


def test_nothing_of_a_factorization_stays_in_the_body() -> None:
    gm, _ = _run(_factors, train=True)
    (body,) = _graphs(gm)[1:]
    assert all(n.target is not torch.linalg.qr for n in body.graph.nodes)


class _Root(nn.Module):
    """The root of a zero, whose derivative is infinite, and another parameter."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64))
        self.q = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _root_in_the_branch_not_taken(m: _Root, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.cond(x.sum() > 0, lambda x: x * m.p.sqrt(), lambda x: x * m.q, (x,))
    return y, m.p.sqrt().detach()


def _root_without_a_gradient(m: _Root, x: Tensor) -> tuple[Tensor]:
    return (_scan(lambda h, row: torch.tanh(h * m.q + row) + m.p.sqrt().detach(), x.expand(4, 3)),)


@pytest.mark.parametrize("body", [_root_in_the_branch_not_taken, _root_without_a_gradient])
def test_no_gradient_does_not_become_one_of_zeros(body: Callable[..., Any]) -> None:
    helpers.skip_unless_scans_train()
    torch.compiler.reset()
    model = _Root(body)
    run = torch.compile(model, backend=fxparam.backend("aot_eager"), fullgraph=True)
    run(-torch.ones(3, dtype=torch.float64))[0].sum().backward()
    assert model.q.grad is not None and model.q.grad.isfinite().all()
    assert model.p.grad is None or not model.p.grad.any()


@pytest.mark.parametrize(
    "body",
    # What is evaluated once to begin with is no news.
    [b for b, (*_, rule) in CASES.items() if rule and b is not _checkpoint_once],
    ids=lambda body: body.__name__,
)
def test_the_report_names_the_rule(body: Callable[..., Any]) -> None:
    _, result = _run(body, train=True)
    rules = {refusal.rule for entry in result.report.entries for refusal in entry.refused}
    assert CASES[body][2] in rules, result.report
