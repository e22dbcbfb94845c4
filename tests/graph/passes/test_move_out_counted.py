"""Code motion out of the bodies of higher-order ops, counted at run time against eager."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fxparam
from tests import helpers
from tests.bodies import STEPS, Cell, in_a_map, in_a_scan, in_a_while, in_both_branches


def _python_loop(m: Cell, x: Tensor) -> Tensor:
    for _ in range(STEPS):
        x = m.step(x)
    return x


def _scan_reads_three_times(m: Cell, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = m.step(m.step(m.step(h) + row))
        return h + 0, h * 2

    return scan(step, x[0], x, dim=0)[1]


def _scan_of_scan(m: Cell, x: Tensor) -> Tensor:
    def inner(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = m.step(h + row)
        return h + 0, h * 2

    def outer(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = scan(inner, h + row, row.unsqueeze(0) * torch.ones(2, 1).to(row), dim=0)[0]
        return h + 0, h * 2

    return scan(outer, x[0], x, dim=0)[1]


def _loop_of_scan(m: Cell, x: Tensor) -> Tensor:
    for _ in range(2):
        x = in_a_scan(m, x)
    return m.step(x)


def _cond_and_outside(m: Cell, x: Tensor) -> Tensor:
    x = torch.cond(x.sum() > 0, lambda x: m.step(x), lambda x: x * 2, (x,))
    return m.step(x)


def _checkpoint(m: Cell, x: Tensor) -> Tensor:
    for _ in range(STEPS):
        x = checkpoint(m.step, x, use_reentrant=False)
    return x


def _checkpoint_of_loop(m: Cell, x: Tensor) -> Tensor:
    for _ in range(2):
        x = checkpoint(lambda x: _python_loop(m, x), x, use_reentrant=False)
    return x


def _scan_of_checkpoint(m: Cell, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = checkpoint(m.step, h + row, use_reentrant=False)
        return h + 0, h * 2

    return scan(step, x[0], x, dim=0)[1]


@torch.compiler.nested_compile_region
def _step_region(m: Cell, x: Tensor) -> Tensor:
    return m.step(x)


def _region(m: Cell, x: Tensor) -> Tensor:
    for _ in range(STEPS):
        x = _step_region(m, x)
    return x


@torch.compiler.nested_compile_region
def _two_regions(m: Cell, x: Tensor) -> Tensor:
    return _step_region(m, _step_region(m, x)) + 1


def _region_in_region(m: Cell, x: Tensor) -> Tensor:
    return _two_regions(m, _two_regions(m, x))


@torch.compiler.nested_compile_region
def _checkpointed_region(m: Cell, x: Tensor) -> Tensor:
    return checkpoint(m.step, x, use_reentrant=False)


def _checkpoint_in_region(m: Cell, x: Tensor) -> Tensor:
    for _ in range(3):
        x = _checkpointed_region(m, x)
    return x


def _region_in_checkpoint(m: Cell, x: Tensor) -> Tensor:
    for _ in range(3):
        x = checkpoint(_step_region, m, x, use_reentrant=False)
    return x


def _while_in_while(m: Cell, x: Tensor) -> Tensor:
    def condition(i: Tensor, h: Tensor) -> Tensor:
        return i < 3

    def inner(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, h + 0.1 * m.cell.parametrizations.weight.original.sum()

    def outer(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, while_loop(condition, inner, (torch.tensor(0), m.step(h)))[1]

    return while_loop(condition, outer, (torch.tensor(0), x))[1]


TRAINED = [
    _python_loop,
    in_a_scan,
    _scan_reads_three_times,
    _loop_of_scan,
    in_a_map,
    in_both_branches,
    _cond_and_outside,
    _checkpoint,
    _checkpoint_of_loop,
    _scan_of_checkpoint,
    _region,
    _region_in_region,
    _checkpoint_in_region,
    _region_in_checkpoint,
]


def _counted(
    body: Callable[..., Any],
    *,
    train: bool,
    inner: str = "aot_eager",
    then: nn.Module | None = None,
    **options: Any,
) -> tuple[tuple[int, int], Any]:
    """Evaluations, forward and backward, of the compiled model, equal to eager; the report."""
    if train and "scan" in body.__name__:
        helpers.skip_unless_scans_train()
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Cell(body)
    if then is not None:
        parametrize.register_parametrization(model.cell, "weight", then)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    fx = fxparam.backend(inner)
    compiled = torch.compile(twin, backend=fx, **options)

    def step(run: Callable[..., Any]) -> Any:
        with torch.set_grad_enabled(train):
            out = run(x)
            if train:
                out.square().sum().backward()
        return out

    expected, actual = step(model), None

    def again() -> None:
        nonlocal actual
        actual = step(compiled)

    again()
    twin.zero_grad()
    counts = helpers.counted(again)
    torch.testing.assert_close(actual, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name, rtol=1e-9, atol=1e-12)
    return counts, fx.last_report


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("body", TRAINED, ids=lambda body: body.__name__)
def test_one_evaluation_forward_and_one_backward(body: Callable[..., Any], fullgraph: bool) -> None:
    counts, _ = _counted(body, train=True, fullgraph=fullgraph)
    # torch 2.11 lets the body of a region in training return what it computes, which stays there.
    more = {_region_in_region: (8, 4), _checkpoint_in_region: (3, 2), _region_in_checkpoint: (3, 2)}
    assert counts == (more.get(body, (1, 1)) if torch.__version__ < "2.12" else (1, 1))


@pytest.mark.parametrize(
    "body", [*TRAINED, _scan_of_scan, in_a_while, _while_in_while], ids=lambda body: body.__name__
)
def test_one_evaluation_in_inference(body: Callable[..., Any]) -> None:
    counts, _ = _counted(body, train=False, fullgraph=True)
    assert counts == (1, 0)


@pytest.mark.parametrize("body", [in_a_scan, in_a_map], ids=lambda body: body.__name__)
def test_loops_train_under_inductor_without_fullgraph(body: Callable[..., Any]) -> None:
    # Where torch alone raises DataDependentOutputException.
    counts, _ = _counted(body, train=True, inner="inductor")
    assert counts == (1, 1)


def test_the_report_says_where_from() -> None:
    _, report = _counted(in_a_scan, train=True)
    (entry,) = report.entries
    assert entry.name == "cell.weight"
    assert entry.kind == ("MatrixExponential", "Counting")
    assert (entry.runs_before, entry.runs) == (5, 1)
    assert entry.hoisted_from == (("scan", 5),)
    assert "moved out of scan of 5 iterations" in repr(report)


def _cond_of_cond(m: Cell, x: Tensor) -> Tensor:
    def inner(h: Tensor) -> Tensor:
        return torch.cond(h.sum() > 0, lambda h: h * 2, lambda h: m.step(h), (h,))

    return torch.cond(x.sum() > 0, lambda h: m.step(inner(h)), lambda h: m.step(h) + 1, (x,))


def test_a_value_that_arrives_twice_is_one_operand() -> None:
    # Moved out of the inner branch it meets itself in the outer one, whose operand it is already.
    counts, _ = _counted(_cond_of_cond, train=False)
    assert counts == (1, 0)


def _policy(decision: Any) -> Callable[[], Any]:
    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return decision if "matrix_exp" in str(op) or "count" in str(op) else PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, decide)


PREFER_RECOMPUTE = CheckpointPolicy.PREFER_RECOMPUTE
RECOMPUTED = _policy(CheckpointPolicy.MUST_RECOMPUTE)
SAVED = _policy(CheckpointPolicy.MUST_SAVE)


def _selective(policy: Callable[[], Any]) -> Callable[..., Tensor]:
    def body(m: Cell, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = checkpoint(m.step, x, use_reentrant=False, context_fn=policy)
        return x

    return body


@pytest.mark.parametrize(
    ("policy", "forward"), [(RECOMPUTED, 2), (SAVED, 1)], ids=["recomputed", "saved"]
)
def test_a_selective_checkpoint_keeps_its_policy(policy: Any, forward: int) -> None:
    # What the last step needs in backward is saved or recomputed, once for all the segments.
    last = helpers.MatrixExponential()
    counts, _ = _counted(_selective(policy), train=True, inner="inductor", then=last)
    assert counts == (forward, 1)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Squared.apply(x)


def test_a_function_leaves_a_selective_checkpoint_with_its_bodies() -> None:
    counts, report = _counted(_selective(SAVED), train=True, then=ByFunction())
    assert counts == (1, 1)
    assert report.entries[0].evaluations == 1


def test_a_bfloat16_value_in_a_scan_keeps_its_gradient() -> None:
    # Computed outside, its gradient would be summed over the steps in bfloat16.
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(8, 8) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
                h = torch.tanh(row + nn.functional.linear(h, self.p @ self.p)).to(h.dtype)
                return h + 0, h * 1.0

            return scan(step, torch.zeros(2, 8), x, dim=0)[1]

    torch.manual_seed(0)
    model, x = Square(), torch.randn(4, 2, 8)
    grads = []
    for backend in ("eager", fxparam.backend()):
        torch.compiler.reset()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.compile(model, backend=backend, fullgraph=True)(x)
        out.float().square().sum().backward()
        grads.append(model.p.grad)
    assert (grads[1] - grads[0]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize("dense", ["contiguous", "transposed"])
@pytest.mark.parametrize("unread", [False, True])
def test_branches_whose_gradients_have_different_strides(dense: str, unread: bool) -> None:
    """torch's ``cond`` refuses these for a weight that enters it, as hoisted by hand."""

    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinh(x if dense == "contiguous" else x.mT)

    def body(m: Cell, x: Tensor) -> Tensor:
        def one(h: Tensor) -> Tensor:
            return h * m.cell.weight + 0

        def other(h: Tensor) -> Tensor:
            return h + 1 if unread else h * m.cell.weight.mT + 0

        return torch.cond(x.sum() > 0, one, other, (x @ m.cell.weight,))

    model = Cell(body)
    parametrize.remove_parametrizations(model.cell, "weight")
    parametrize.register_parametrization(model.cell, "weight", Map())
    for sign in (1, -1):
        model.zero_grad()
        x = sign * torch.rand(3, 3, dtype=torch.float64)
        fx = fxparam.backend("aot_eager")
        helpers.check_against_eager(model, fx, x)
        assert fx.last_report is not None and fx.last_report.entries[0].evaluations == 1
        torch.compiler.reset()


@torch.compiler.nested_compile_region
def _region(x: Tensor) -> Tensor:
    return 2 * torch.sinh(x)


def test_calls_of_one_region_of_which_some_are_shared() -> None:
    class ByRegion(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _region(x)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
            for cell in (self.one, self.two):
                parametrize.register_parametrization(cell, "weight", ByRegion())

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.two(self.one(torch.tanh(self.one(x)))))

    torch.compiler.reset()
    fx = fxparam.backend("aot_eager")
    helpers.check_against_eager(Two(), fx, torch.randn(2, 3, dtype=torch.float64))
    # The second call of each weight, and what takes its result.
    assert fx.last_report is not None and fx.last_report.merged == 4


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_a_function_leaves_a_checkpoint_in_a_branch() -> None:
    """Its bodies come with it, into a graph whose effects were looked at before that."""
    p = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def segment(h: Tensor) -> Tensor:
        return h + 0.5 * _Rounded.apply(p)

    def branch(h: Tensor) -> Tensor:
        h = checkpoint(segment, h, use_reentrant=False)
        return torch.tanh(h @ _Rounded.apply(p).mT)

    def forward(h: Tensor) -> Tensor:
        h = torch.cond(h.sum() > 0, lambda h: h + 0, branch, (h,))
        return checkpoint(lambda h: _Rounded.apply(p) @ h, h, use_reentrant=False)

    fx = fxparam.backend("aot_eager")
    x = torch.randn(3, 3, dtype=torch.float64)
    expected, actual = forward(x), torch.compile(forward, backend=fx)(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.square().sum(), p)[0] for out in (actual, expected))
    )
    assert fx.last_report is not None
    assert fx.last_report.entries[0].evaluations == 1


class _Masked(nn.Module):
    """A pure part, which leaves bodies, and a random one, which does not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * torch.rand_like(x)


def test_an_evaluation_that_leaves_a_body_in_part_is_one() -> None:
    layer = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", _Masked())

    def forward(x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    fx = fxparam.backend("aot_eager")
    torch.compile(forward, backend=fx)(torch.randn(3, 3))
    assert fx.last_report is not None
    (entry,) = fx.last_report.entries
    assert fx.last_report.merged > 0
    assert (entry.accesses, entry.evaluations, entry.runs) == (3, 3, 3)


@torch.compiler.nested_compile_region
def _layer_in_a_region(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(layer(x))


def test_a_solver_in_a_region_keeps_its_gradient() -> None:
    """Which torch 2.13 loses: its check for singular matrices is an effect in the region."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)
            parametrizations.orthogonal(self.layer, orthogonal_map="cayley")

        def forward(self, x: Tensor) -> Tensor:
            return _layer_in_a_region(self.layer, _layer_in_a_region(self.layer, x))

    x = torch.randn(2, 3, dtype=torch.float64)
    helpers.check_against_eager(Twice(), fxparam.backend("aot_eager"), x)


def test_a_constant_does_not_leave_a_checkpoint_alone() -> None:
    """The evaluation stays, for its original is written: with its identity matrix moved out, torch
    2.13 could not partition the graph."""
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    parametrizations.orthogonal(layer, orthogonal_map="cayley")
    twin, x = copy.deepcopy(layer), torch.randn(2, 3, dtype=torch.float64)

    def forward(layer: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            layer.parametrizations.weight.original.detach().add_(0.1)
        _ = layer.weight
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(forward, backend=fxparam.backend("aot_eager"))
    for run, model in ((forward, layer), (compiled, twin)):
        run(model, x).square().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
