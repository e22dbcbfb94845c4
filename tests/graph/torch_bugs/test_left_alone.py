"""Bugs of torch that users meet and that fxparam does nothing about: docs/torch-bugs.md lists them.

Each program says whether torch alone goes wrong. Where one no longer does, the page is out of date.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tests.graph.torch_bugs import torch_alone


@torch.compiler.nested_compile_region
def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.sin() * b.cos()


def region_with_one_tensor_twice() -> bool:
    """The code of the call in which both operands are one tensor runs for the other call."""
    a, b = torch.randn(4), torch.randn(4)
    compiled = torch.compile(lambda a, b: _product(a, a) + _product(a, b), backend="aot_eager")
    right = a.sin() * a.cos() + a.sin() * b.cos()
    return not torch.allclose(compiled(a, b), right)


def region_with_one_tensor_twice_later() -> bool:
    compiled = torch.compile(lambda a, b: _product(a, b) + _product(a, a), backend="aot_eager")
    raised = torch_alone.message(lambda: compiled(torch.randn(4), torch.randn(4)))
    assert not raised or "list index out of range" in raised
    return bool(raised)


@torch.compiler.nested_compile_region
def _solved(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(a, b)


def region_that_solves_twice() -> bool:
    """The result asks for a gradient, and its backward gives none."""
    a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    compiled = torch.compile(lambda a, b: _solved(a, b) + _solved(2 * a, b), backend="aot_eager")
    out = compiled(a, b)
    assert out.requires_grad
    out.sum().backward()
    return a.grad is None and b.grad is None


def region_that_solves_once() -> bool:
    return torch_alone.error(_solved, "aot_eager") > 1e-12


def branch_that_solves() -> bool:
    def program(a: Tensor, b: Tensor) -> Tensor:
        one = a.sum() > -1000
        return torch.cond(
            one, torch.linalg.solve, lambda a, b: torch.linalg.solve(a, 2 * b), (a, b)
        )

    raised = torch_alone.message(lambda: torch_alone.error(program, "aot_eager"))
    assert not raised or "missing 1 required positional argument: 'tangents_token'" in raised
    return bool(raised)


def _trips(n: int) -> tuple[float, float]:
    """Return the result and the gradient of a loop of ``n`` trips, not even compiled."""
    x = torch.tensor([1.0], requires_grad=True)
    start = torch.tensor(0)
    _, out = while_loop(lambda i, x: i < n, lambda i, x: (i + 1, x * x.cos()), (start, x))
    return out.item(), torch.autograd.grad(out, x)[0].item()


def while_loop_of_no_trip() -> bool:
    """The result is that of no trip, the gradient that of one."""
    out, gradient = _trips(0)
    assert out == 1
    assert gradient in (1, _trips(1)[1])
    return gradient != 1


def _scans(function: Callable[[Tensor], Tensor], needs_gradient: bool) -> str:
    """Return what a scan in a scan raises."""

    def program(h: Tensor, xs: Tensor, weight: Tensor) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return function(h * weight + x), h * 2

        def outer(h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            last, _ = scan(step, h, rows, dim=0)
            return last + 0, last * 2

        return scan(outer, h, xs, dim=0)[1]

    h, weight = (torch.randn(3, requires_grad=True) for _ in range(2))
    xs = torch.randn(2, 4, 3, requires_grad=needs_gradient)
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    return torch_alone.message(lambda: compiled(h, xs, weight).sum().backward())


def scan_in_a_scan_that_saves_its_result() -> bool:
    raised = _scans(lambda h: torch.tanh(h) + 0, False)
    assert not raised or "derivative for aten::detach_copy is not implemented" in raised
    return bool(raised)


def scan_in_a_scan_over_what_needs_a_gradient() -> bool:
    raised = _scans(torch.sin, True)
    assert not raised or "scan might be aliasing the input or the output" in raised
    return bool(raised)


def scan_in_a_scan_of_another_kind() -> bool:
    return bool(_scans(torch.sin, False))


def scan_whose_carry_is_saved() -> bool:
    def program(h: Tensor, xs: Tensor) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(h + x)
            return h, h * 2

        return scan(step, h[0], xs, dim=0)[1]

    compiled = torch.compile(program, backend="inductor", fullgraph=True)
    inputs = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    raised = torch_alone.message(lambda: compiled(*inputs).sum().backward())
    assert not raised or "scan might be aliasing the input or the output" in raised
    return bool(raised)


def scan_whose_start_needs_no_gradient() -> bool:
    """What a parameter does to later steps, through the carry, is missing in its gradient."""
    weight = torch.tensor([0.5], requires_grad=True)
    (last, _) = scan(
        lambda h, x: (h * weight + x, h * weight * 2), torch.ones(1), torch.ones(3, 1), dim=0
    )
    h = torch.ones(1)
    for _ in range(3):
        h = h * weight + 1
    (actual,), (expected,) = (torch.autograd.grad(out, weight) for out in (last, h))
    assert torch.equal(last, h)
    return not torch.equal(actual, expected)


def _signs(program: Callable[[Tensor], tuple[Tensor, ...]], backend: str, x: float) -> bool:
    given = torch.tensor([x], requires_grad=True)
    outs = zip(program(given), torch.compile(program, backend=backend)(given), strict=True)
    return any(bool(a.signbit() != b.signbit()) for a, b in outs)


def cse_of_autograd_takes_zeros_for_equal() -> bool:
    return _signs(lambda x: (1 / (x * 0.0), 1 / (x * -0.0)), "aot_eager", 1.0)


def cse_of_fx_takes_zeros_for_equal() -> bool:
    gm = make_fx(lambda x: (x * 0.0, x * -0.0))(torch.ones(1))
    merged = CSEPass()(gm).graph_module(torch.ones(1))
    return bool(merged[0].signbit() == merged[1].signbit())


def inductor_drops_an_added_zero() -> bool:
    return _signs(lambda x: (x + 0.0,), "inductor", -0.0)


def _share_memory(program: Callable[[Tensor], tuple[Tensor, ...]]) -> bool:
    """Return whether an input and compiled results share memory; in eager code they do not."""
    given = torch.randn(4)
    for run in (program, torch.compile(program, backend="inductor")):
        tensors = (given, *run(given))
        shared = len({t.data_ptr() for t in tensors}) < len(tensors)
        assert not (shared and run is program)
    return shared


def inductor_returns_its_input() -> bool:
    return _share_memory(lambda x: (x * 1.0, x.sin()))


def inductor_returns_one_tensor_for_two_copies() -> bool:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.sin()
        return x.clone(), x.clone()

    return _share_memory(program)


def inputs_that_share_memory_later() -> bool:
    def program(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return x + y

    compiled = torch.compile(program, backend="aot_eager")
    compiled(torch.ones(4), torch.ones(4))
    both, again = torch.ones(8), torch.ones(8)
    return not torch.equal(compiled(both[:4], both[2:6]), program(again[:4], again[2:6]))


class _Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin().exp()


def _checkpointed(rows: int, *, cached: bool, use_reentrant: bool = False) -> Tensor:
    """Return the gradient of a weight that a checkpointed function reads twice."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", _Exponential())
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        function = lambda x: torch.tanh(layer(torch.tanh(layer(x))))  # noqa: E731
        return checkpoint(function, x, use_reentrant=use_reentrant)

    if cached:
        with parametrize.cached():
            out = run()
    else:
        out = run()
    out.square().sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient is not None
    return gradient


def cached_around_a_checkpoint() -> bool:
    """Wrong in silence where what is saved happens to have the shapes of what was saved."""
    wrong = _checkpointed(3, cached=True) - _checkpointed(3, cached=False)
    return bool(wrong.abs().max() > 0.1)


def cached_around_a_checkpoint_with_other_shapes() -> bool:
    raised = torch_alone.message(lambda: _checkpointed(2, cached=True))
    assert not raised or "Recomputed values" in raised
    return bool(raised)


def cached_around_a_reentrant_checkpoint() -> bool:
    expected = _checkpointed(3, cached=False, use_reentrant=True)
    return not torch.equal(_checkpointed(3, cached=True, use_reentrant=True), expected)


class _Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def _is_left_after_functional_call(**options: bool) -> bool:
    """Check whether the tensor given to a call stays in the module."""
    model = _Twice()
    kept, given = model.first.bias, torch.zeros(2)
    functional_call(model, {"first.bias": given}, (torch.ones(1, 2),), **options)
    assert model.first.bias is kept or model.first.bias is given
    return model.first.bias is given


def functional_call_of_a_layer_under_two_names() -> bool:
    return _is_left_after_functional_call()


def functional_call_that_ties_nothing() -> bool:
    return _is_left_after_functional_call(tie_weights=False)


def _weight_norm(dims: int) -> str:
    v, g = torch.randn(3, 2), torch.ones(3, *[1] * (dims - 1))
    right = torch._weight_norm(v, g, 0)
    compiled = torch.compile(lambda v, g: torch._weight_norm(v, g, 0), backend="aot_eager")
    return torch_alone.message(lambda: torch.testing.assert_close(compiled(v, g), right))


def weight_norm_by_a_vector() -> bool:
    raised = _weight_norm(1)
    assert not raised or "broadcast" in raised
    return bool(raised)


def weight_norm_by_a_column() -> bool:
    return bool(_weight_norm(2))


@pytest.mark.parametrize(
    ("errs", "since", "mended_in"),
    [
        (region_with_one_tensor_twice, "2.13", None),
        (region_with_one_tensor_twice_later, "2.13", None),
        (region_that_solves_twice, "2.13", None),
        (branch_that_solves, "2.13", None),
        (while_loop_of_no_trip, torch_alone.OLDEST, None),
        (scan_in_a_scan_that_saves_its_result, torch_alone.OLDEST, None),
        (scan_in_a_scan_over_what_needs_a_gradient, torch_alone.OLDEST, None),
        (scan_whose_carry_is_saved, torch_alone.OLDEST, None),
        (scan_whose_start_needs_no_gradient, torch_alone.OLDEST, "2.13"),
        (cse_of_autograd_takes_zeros_for_equal, torch_alone.OLDEST, "2.15"),
        (cse_of_fx_takes_zeros_for_equal, torch_alone.OLDEST, None),
        (inductor_drops_an_added_zero, "2.15", None),
        (inductor_returns_its_input, "2.15", None),
        (inductor_returns_one_tensor_for_two_copies, torch_alone.OLDEST, None),
        (inputs_that_share_memory_later, torch_alone.OLDEST, None),
        (cached_around_a_checkpoint, torch_alone.OLDEST, None),
        (cached_around_a_checkpoint_with_other_shapes, torch_alone.OLDEST, None),
        (functional_call_of_a_layer_under_two_names, torch_alone.OLDEST, None),
        (weight_norm_by_a_vector, torch_alone.OLDEST, None),
    ],
)
def test_torch_alone(errs: Callable[[], bool], since: str, mended_in: str | None) -> None:
    then = "docs/torch-bugs.md and docs/limits.md may say so"
    torch_alone.check(errs(), since=since, mended_in=mended_in, then=then)


@pytest.mark.parametrize(
    "errs",
    [
        region_that_solves_once,
        scan_in_a_scan_of_another_kind,
        cached_around_a_reentrant_checkpoint,
        functional_call_that_ties_nothing,
        weight_norm_by_a_column,
    ],
)
def test_torch_alone_is_right(errs: Callable[[], bool]) -> None:
    """The ways out that the page gives."""
    assert not errs()
