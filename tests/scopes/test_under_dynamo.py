"""``cached()`` in code compiled with fxparam's backend: one graph, and the values of eager code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxparam
import fxparam.parametrize as ours
from tests import helpers, regions
from tests.fuzz.pieces import Symmetric, Transposed
from tests.regions import WRAPS, Model


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _value_written(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        with torch.no_grad():
            m.cell.weight.mul_(1.5)
            y = m.cell(x)
        return m.cell(x) + y


def _around_a_call_with_other_originals(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        w = m.cell.weight
        if w.requires_grad and w.is_leaf is False:
            w.register_hook(lambda grad: 2 * grad)
        name = "parametrizations.weight.original"
        swapped = {name: 1.5 * m.cell.parametrizations.weight.original}
        return m.cell(torch.func.functional_call(m.cell, swapped, (x,))) + x @ w


def _region_in_a_checkpoint(m: Model, x: Tensor) -> Tensor:
    def run(x: Tensor) -> Tensor:
        with fxparam.cached():
            return m.cell(m.cell(x))

    return checkpoint(run, checkpoint(run, x, use_reentrant=False), use_reentrant=False)


def _evaluated_again_after_eval(m: Model, x: Tensor) -> Tensor:
    # The region keeps one value for the same originals: the last one.
    with fxparam.cached():
        y = m.cell(x)
        m.cell.eval()
        y = y + m.cell(x)
        m.cell.train()
        return y + m.cell(x)


def _with_a_hook(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        w = m.cell.weight
        w.register_hook(lambda grad: grad * 2)
        return nn.functional.linear(x, w) + m.cell(x)


FEWER_WHEN_PURE = {regions.two_regions: 1, regions.before_inside_and_after: 1}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "body",
    [
        *regions.BODIES,
        _value_written,
        _evaluated_again_after_eval,
        _with_a_hook,
        _around_a_call_with_other_originals,
    ],
    ids=lambda body: body.__name__,
)
def test_equals_eager_in_one_graph(body: Callable[..., Any], wrap: str) -> None:
    if body is _value_written and wrap == "random mask":
        pytest.skip("AOTAutograd drops the numbers drawn for a value that is only written")
    if body in (_with_a_hook, _around_a_call_with_other_originals) and torch.__version__ < "2.13":
        pytest.skip("Dynamo hangs the hook on a copy of the value")
    model = Model(wrap, body)
    twin = copy.deepcopy(model)
    fx = fxparam.backend("aot_eager")
    compiled = torch.compile(twin, backend=fx, fullgraph=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    regions.check(compiled, twin, model, x)
    if body in regions.BODIES:
        (entry,) = (e for e in fx.reports[0].entries if e.name == "cell.weight")
        left = (
            FEWER_WHEN_PURE.get(body, regions.BODIES[body])
            if wrap == "pure"
            else regions.BODIES[body]
        )
        assert entry.evaluations == left


class _Reading(nn.Module):
    """Reads another parametrized tensor, twice."""

    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.other = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        WRAPS[wrap](self.other)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other.weight + 2 * self.other.weight


def _inside_first(m: Model, other: nn.Module, x: Tensor) -> Tensor:
    return m.cell(m.cell(x)) @ other.weight


def _outside_first(m: Model, other: nn.Module, x: Tensor) -> Tensor:
    return m.cell(x @ other.weight) + m.cell(x)


def _value_inside_written(m: Model, other: nn.Module, x: Tensor) -> Tensor:
    x = m.cell(x)
    w = other.weight
    w.add_(0.1)
    return m.cell(x @ w) @ other.weight


def _other_originals_outside(m: Model, other: nn.Module, x: Tensor) -> Tensor:
    x = m.cell(x)
    name = "parametrizations.weight.original"
    swapped = {name: 1.5 * m.cell.parametrizations.weight.original}
    return m.cell(torch.func.functional_call(m.cell, swapped, (x,))) @ other.weight


@pytest.mark.parametrize(
    "read",
    [_inside_first, _outside_first, _value_inside_written, _other_originals_outside],
    ids=lambda read: read.__name__,
)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_parametrization_that_reads_a_parametrized_tensor(
    wrap: str, read: Callable[..., Tensor]
) -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        with fxparam.cached():
            return read(m, m.cell.parametrizations.weight[1].other, x)

    model = Model("pure", body)
    ours.register_parametrization(model.cell, "weight", _Reading(wrap))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, torch.randn(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("wrap", ["random mask", "pure"])
def test_a_region_in_a_checkpointed_function(wrap: str) -> None:
    model = Model(wrap, _region_in_a_checkpoint)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    for actual, expected in zip(
        regions.steps(twin, compiled, x), regions.steps(model, model, x), strict=True
    ):
        assert_close(actual[:-1], expected[:-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_other_backends_keep_the_region_of_eager_code(backend: str, wrap: str) -> None:
    model = Model(wrap, regions.loop_in_a_region)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend)
    x = torch.randn(2, 3, dtype=torch.float64)
    regions.check(compiled, twin, model, x)


def test_a_frame_resumed_after_a_graph_break_knows_its_region() -> None:
    # Such a frame has no module names; the marks are all that tells one evaluation from another.
    def body(m: Model, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return regions.loop_in_a_region(m, x)

    model = Model("spectral norm", body)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    x = torch.randn(2, 3, dtype=torch.float64)
    regions.check(compiled, twin, model, x)


def test_a_graph_break_in_a_region_leaves_it_to_eager_code() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        with fxparam.cached():
            x = m.cell(x)
            torch._dynamo.graph_break()
            return m.cell(x)

    model = Model("spectral norm", body)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    x = torch.randn(2, 3, dtype=torch.float64)
    regions.check(compiled, twin, model, x)


def _scan_in_a_region(m: Model, x: Tensor) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.cell(h + row))
        return h + 0, h * 2

    with fxparam.cached():
        x = m.cell(x)
        return scan(step, x[0], x, dim=0)[1]


def _as_a_python_loop(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        x = m.cell(x)
        h, rows = x[0], []
        for row in x:
            h = torch.tanh(m.cell(h + row))
            rows.append(h * 2)
    return torch.stack(rows)


@pytest.mark.parametrize("wrap", ["random mask", "pure"])
def test_a_region_around_a_loop_holds_for_its_body(wrap: str) -> None:
    model = Model(wrap, _as_a_python_loop)
    twin = copy.deepcopy(model)
    twin.body = _scan_in_a_region
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    x = torch.randn(4, 3, dtype=torch.float64)
    regions.check(compiled, twin, model, x)


def _around_a_checkpoint(m: Model, x: Tensor, run: Callable[..., Any], order: str) -> Tensor:
    with fxparam.cached():
        if order == "shape, before":
            x = x[:, : m.cell.weight.shape[0]]
        if order != "after":
            x = m.cell(x)
        x, weight = run(lambda h: (torch.tanh(m.cell(h)), m.cell.weight.exp()), x)
        return m.cell(x) @ weight


@pytest.mark.parametrize("order", ["before", "shape, before", "after"])
@pytest.mark.parametrize("wrap", ["random mask", "clipped", "in place", "pure"])
def test_a_region_around_a_checkpoint_holds_in_it_and_around_it(wrap: str, order: str) -> None:
    def checkpointed(m: Model, x: Tensor) -> Tensor:
        return _around_a_checkpoint(m, x, partial(checkpoint, use_reentrant=False), order)

    def straight(m: Model, x: Tensor) -> Tensor:
        return _around_a_checkpoint(m, x, lambda function, x: function(x), order)

    model = Model(wrap, straight)
    twin = copy.deepcopy(model)
    twin.body = checkpointed
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, torch.randn(3, 3, dtype=torch.float64))


class Noise(nn.Module):
    """Draws twice, of what no tensor tells apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(3, 3) < 0.7) + torch.rand(3, 3)


class Two(nn.Module):
    """Two masked layers, whose originals are one tensor or two."""

    def __init__(self, body: Callable[..., Any], mask: type[nn.Module], tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.a, self.b = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        if tied:
            self.b.weight = self.a.weight
        for layer in (self.a, self.b):
            ours.register_parametrization(layer, "weight", mask())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def _rows(m: Two, h: Tensor) -> Tensor:
    return nn.functional.dropout(m.b(torch.tanh(m.a(h))) + m.b.weight.sum())


def _segments(m: Two, x: Tensor, run: Callable[..., Any]) -> Tensor:
    with fxparam.cached():
        return run(partial(_rows, m), run(partial(_rows, m), x))


def _a_loop_of_two(m: Two, x: Tensor, loop: Callable[..., Any]) -> Tensor:
    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.b(h + m.a(row)))
        return h + 0, h * 2

    with fxparam.cached():
        return loop(step, x[0], x)


def _python_loop(step: Callable[..., Any], h: Tensor, xs: Tensor) -> Tensor:
    rows = []
    for x in xs:
        h, row = step(h, x)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mask", [helpers.RandomMask, Noise])
def test_several_random_evaluations_in_a_checkpoint(mask: type[nn.Module], tied: bool) -> None:
    """Drawn in front of the first checkpoint that reads them, in the order of the program."""
    model = Two(partial(_segments, run=lambda function, x: function(x)), mask, tied)
    twin = copy.deepcopy(model)
    twin.body = partial(_segments, run=partial(checkpoint, use_reentrant=False))
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, torch.randn(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mask", [helpers.RandomMask, Noise])
def test_several_random_evaluations_in_a_scan(mask: type[nn.Module], tied: bool) -> None:
    helpers.skip_unless_scans_train()
    model = Two(partial(_a_loop_of_two, loop=_python_loop), mask, tied)
    twin = copy.deepcopy(model)
    twin.body = partial(_a_loop_of_two, loop=lambda step, h, xs: scan(step, h, xs, dim=0)[1])
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, torch.randn(4, 3, dtype=torch.float64))


def _out_of_turn(m: Two, x: Tensor, run: Callable[..., Any], *, before: bool) -> Tensor:
    with fxparam.cached():
        x = m.b(x) if before else x
        return run(lambda h: m.b(nn.functional.dropout(m.a(h))), x)


def test_random_evaluations_in_a_checkpoint_that_need_not_move() -> None:
    body = partial(_out_of_turn, before=False)
    model = Two(partial(body, run=lambda function, x: function(x)), helpers.RandomMask, False)
    twin = copy.deepcopy(model)
    twin.body = partial(body, run=partial(checkpoint, use_reentrant=False))
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, torch.randn(3, 3, dtype=torch.float64))


def test_random_evaluations_are_not_drawn_out_of_turn() -> None:
    body = partial(_out_of_turn, before=True, run=partial(checkpoint, use_reentrant=False))
    model = Two(body, helpers.RandomMask, False)
    compiled = torch.compile(model, backend=fxparam.backend("aot_eager"))
    with pytest.raises(Exception, match=r"b\.weight is read before the loop"):
        compiled(torch.randn(3, 3, dtype=torch.float64))


def test_what_cannot_be_moved_is_refused() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        # The loop draws numbers of its own before the mask is drawn.
        with fxparam.cached():
            return torch_map(lambda row: m.cell(nn.functional.dropout(row)), x)

    compiled = torch.compile(Model("random mask", body), backend=fxparam.backend("aot_eager"))
    with pytest.raises(Exception, match=r"cell\.weight is read before the loop"):
        compiled(torch.randn(4, 3, dtype=torch.float64))


def _unused_in_a_body(layer: nn.Module, x: Tensor) -> Tensor:
    with fxparam.cached():
        y = layer(x)
        return checkpoint(lambda h: (layer.weight.mT, h * 2)[1], y, use_reentrant=False)


def _unused_before_a_body(layer: nn.Module, x: Tensor) -> Tensor:
    with fxparam.cached():
        _ = layer.weight.mT
        y = checkpoint(lambda h: torch.tanh(layer(h)), x, use_reentrant=False)
    with torch.no_grad():  # keeps the evaluation in the body
        layer.parametrizations.weight.original.mul_(1)
    return y


@pytest.mark.parametrize("run", [_unused_in_a_body, _unused_before_a_body])
def test_a_read_of_which_nothing_is_made_is_not_refused(run: Callable[..., Tensor]) -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    ours.register_parametrization(layer, "weight", regions.Clipped())
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, dtype=torch.float64)
    actual = torch.compile(run, backend=fxparam.backend("aot_eager"), fullgraph=True)(twin, x)
    expected = run(layer, x)
    assert_close(actual, expected)
    if run is _unused_in_a_body:  # the other runs again, from what it has written
        actual.sum().backward()
        expected.sum().backward()
    for a, b in zip(twin.parameters(), layer.parameters(), strict=True):
        assert_close((a, a.grad), (b, b.grad))


def test_what_comes_out_of_a_body_is_not_taken_from_what_is_evaluated_after_it() -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    for step in (Transposed(), Symmetric()):
        ours.register_parametrization(layer, "weight", step)

    def run(x: Tensor) -> Tensor:
        with fxparam.cached():
            i = torch.tensor(0)
            x = while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, layer(h)), (i, x))[1]
            return layer(x)

    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        actual = torch.compile(run, backend=fxparam.backend("aot_eager"), fullgraph=True)(x)
        assert_close(actual, layer(layer(layer(x))))


def test_one_backward_for_a_region_around_a_loop() -> None:
    """Several are another gradient where the backward is not additive: asked for, it is one."""
    layer = nn.Linear(3, 3, dtype=torch.float64)
    ours.register_parametrization(layer, "weight", regions.Clipped())
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, dtype=torch.float64)

    def by_map(layer: nn.Module, x: Tensor) -> Tensor:
        with fxparam.cached():
            return torch_map(lambda row: layer(row), x)

    def by_loop(layer: nn.Module, x: Tensor) -> Tensor:
        with fxparam.cached():
            return torch.stack([layer(row) for row in x])

    expected, actual = (
        by_loop(layer, x),
        torch.compile(by_map, backend=fxparam.backend("aot_eager"))(twin, x),
    )
    assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(q.grad, p.grad)


def test_an_access_in_a_branch_that_nobody_uses_is_not_refused() -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    ours.register_parametrization(layer, "weight", regions.Clipped())
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, dtype=torch.float64)

    def unused(h: Tensor) -> Tensor:
        _ = twin.weight
        return h + 1

    def forward(x: Tensor) -> Tensor:
        with fxparam.cached():
            return twin(torch.cond(x.sum() < 0, lambda h: h + 0, unused, (x,)))

    actual = torch.compile(forward, backend=fxparam.backend("aot_eager"))(x)
    expected = layer(x + (x.sum() >= 0))
    assert_close(actual, expected)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(
            torch.autograd.grad(actual.sum(), q, retain_graph=True),
            torch.autograd.grad(expected.sum(), p, retain_graph=True),
        )


def test_a_branch_that_is_not_taken_has_no_backward() -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    ours.register_parametrization(layer, "weight", regions.PlusOne())
    twin, x = copy.deepcopy(layer), torch.rand(3, 3, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        h = twin(x) ** 2
        with fxparam.cached():
            return torch.cond(h.sum() < 0, lambda h: h @ twin.weight, lambda h: h * 2, (h,))

    actual = torch.compile(forward, backend=fxparam.backend("aot_eager"))(x)
    expected = 2 * layer(x) ** 2
    assert_close(actual, expected)
    assert_close(
        torch.autograd.grad(actual.sum(), list(twin.parameters())),
        torch.autograd.grad(expected.sum(), list(layer.parameters())),
    )


def test_a_value_of_a_region_that_escapes_is_not_used_after_it() -> None:
    """One of the accesses in the region returns a view: the region's value is written outside."""
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    ours.register_parametrization(layer, "weight", helpers.MatrixExponential())
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, dtype=torch.float64)

    def forward(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        with fxparam.cached():
            h = x + 0.5 * layer.weight.sum()
            shown = layer.weight.detach()
        return layer(h), shown

    for inner in ("eager", "aot_eager"):
        gradients = []
        compiled = torch.compile(forward, backend=fxparam.backend(inner))
        for run, model in ((forward, layer), (compiled, twin)):
            out, shown = run(model, x)
            with torch.no_grad():
                shown.mul_(2)
            gradients += torch.autograd.grad(out.square().sum(), list(model.parameters()))
        assert_close(*gradients)


def test_torchs_own_cached_keeps_working() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        with torch.nn.utils.parametrize.cached():
            return m.cell(m.cell(x))

    model = Model("pure", body)
    torch_model = Model("pure", body)
    torch_model.cell = nn.Linear(3, 3, dtype=torch.float64)
    torch.nn.utils.parametrize.register_parametrization(
        torch_model.cell, "weight", helpers.MatrixExponential()
    )
    for m in (model, torch_model):
        x = torch.randn(2, 3, dtype=torch.float64)
        compiled = torch.compile(m, backend=fxparam.backend("aot_eager"), fullgraph=True)
        assert_close(compiled(x), m(x))


def _left_by_break(m: Model, x: Tensor) -> Tensor:
    def layers() -> Iterator[Tensor]:
        with fxparam.cached():
            yield m.cell.weight
            yield m.cell.weight

    for weight in layers():
        x = x @ weight
        break
    return m.cell(m.cell(x))


def _interleaved(m: Model, x: Tensor) -> Tensor:
    def layers() -> Iterator[Tensor]:
        with fxparam.cached():
            for _ in range(3):
                yield m.cell.weight

    for one, other in zip(layers(), layers(), strict=True):
        x = x @ one + x @ other
    return m.cell(m.cell(x))


def _under_vmap(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        y = m.cell(x)
        return y + torch.vmap(m.cell)(x)


def _in_a_gradient(m: Model, x: Tensor) -> Tensor:
    with fxparam.cached():
        y = m.cell(x)
        return y + torch.func.grad(lambda t: m.cell(t).square().sum())(x)


@pytest.mark.parametrize("kind", [regions.Scheduled, regions.Initialized])
@pytest.mark.parametrize(
    "body", [regions.loop_in_a_region, regions.two_regions, regions.before_inside_and_after]
)
def test_evaluations_that_change_attributes_are_left_to_eager_code(
    body: Callable[..., Any], kind: type[nn.Module]
) -> None:
    model = Model("pure", body)
    ours.remove_parametrizations(model.cell, "weight")
    ours.register_parametrization(model.cell, "weight", kind(), unsafe=True)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    regions.check(compiled, twin, model, torch.randn(3, 3, dtype=torch.float64))
    mine, theirs = (vars(m.cell.parametrizations.weight[0]) for m in (twin, model))
    assert mine.get("n") == theirs.get("n")


def test_evaluations_that_assign_what_is_there_stay_in_the_graph() -> None:
    class Recording(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.rows, self.last, self.shape = len(x), x.detach() * 2, x.shape
            return x.sin()

    model = Model("pure", regions.loop_in_a_region)
    ours.register_parametrization(model.cell, "weight", Recording())
    _ = model.cell.weight
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, torch.randn(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "body",
    [_left_by_break, _interleaved, _under_vmap, _in_a_gradient],
    ids=lambda body: body.__name__,
)
def test_what_marks_cannot_tell_is_left_to_eager_code(body: Callable[..., Any], wrap: str) -> None:
    model = Model(wrap, body)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"))
    x = torch.randn(3, 3, dtype=torch.float64)
    regions.check(compiled, twin, model, x)
    # Nor does it leave anything to later code.
    model, twin = (Model(wrap, regions.two_regions) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager"), fullgraph=True)
    regions.check(compiled, twin, model, x)
