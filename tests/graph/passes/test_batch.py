"""``batch``: the same evaluation of different tensors is one, on their stack."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import fxparam
from fxparam._torch.dynamo import lookup_backend
from fxparam._torch.fx import op_name
from tests.fuzz.pieces import cond, map_rows
from tests.helpers import Counting, LowRank, MatrixExponential, RandomMask, check_against_eager

SIZE = 3
Program = Callable[[nn.ModuleList, Tensor], Any]
Wrap = Callable[[nn.Module], Any]


def exponential(layer: nn.Module) -> nn.Module:
    return register_parametrization(layer, "weight", MatrixExponential())


def in_turn(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = torch.tanh(layer(x))
    return x


class Layers(nn.Module):
    """Layers with a parametrized weight each, and a program that runs them."""

    def __init__(
        self, wrap: Wrap = exponential, count: int = 3, program: Program = in_turn
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = (nn.Linear(SIZE, SIZE, dtype=torch.float64) for _ in range(count))
        self.layers = nn.ModuleList(map(wrap, made))
        self.program = program

    def forward(self, x: Tensor) -> Any:
        return self.program(self.layers, x)


class Recorder:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self, inner: str = "aot_eager") -> None:
        self.inner = inner
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return lookup_backend(self.inner)(gm, inputs)

    def count(self, *names: str) -> int:
        """Return how many nodes of the graphs, and of bodies in them, call one of some ops."""
        bodies = (m for gm in self.graphs for m in gm.modules() if isinstance(m, GraphModule))
        return sum(op_name(node) in names for body in bodies for node in body.graph.nodes)

    @property
    def exponentials(self) -> int:
        return self.count("matrix_exp", "linalg_matrix_exp")


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, SIZE, dtype=torch.float64)


def compiled_like_eager(model: nn.Module, inner: str = "aot_eager", **options: Any) -> Recorder:
    """Compare a model's training steps with eager; return what the inner backend was given."""
    torch.compiler.reset()
    recorder = Recorder(inner)
    check_against_eager(model, fxparam.backend(recorder, **options), inputs())
    return recorder


# --- batched -----------------------------------------------------------------------------------

MAPS: dict[str, tuple[Wrap, str]] = {
    "exponential": (exponential, "linalg_matrix_exp"),
    "orthogonal by exponential": (
        lambda layer: orthogonal(layer, orthogonal_map="matrix_exp"),
        "linalg_matrix_exp",
    ),
    "orthogonal by Householder": (
        lambda layer: orthogonal(layer, orthogonal_map="householder"),
        "linalg_solve_triangular",  # as it is lowered first
    ),
    "orthogonal by Cayley": (
        lambda layer: orthogonal(layer, orthogonal_map="cayley"),
        "_linalg_solve_ex",
    ),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MAPS)
def test_evaluations_of_different_tensors_are_one(name: str, inner: str) -> None:
    wrap, op = MAPS[name]
    recorder = compiled_like_eager(Layers(wrap), inner)
    assert recorder.count(op) == 1
    assert recorder.count("stack") >= 1
    assert recorder.count("unbind") == 1


def test_inductor_gives_what_eager_gives() -> None:
    check_against_eager(Layers(MAPS["orthogonal by Cayley"][0]), fxparam.backend(), inputs())


def test_small_exponentials_are_lowered_together() -> None:
    """A single one of 40 rows is torch's, as that is faster."""
    pair, recorder = Pair(*torch.randn(2, 40, 40) / 40), Recorder("aot_eager")
    x = torch.randn(2, 40)
    torch.compiler.reset()
    actual = torch.compile(pair, backend=fxparam.backend(recorder))(x)
    torch.testing.assert_close(actual, pair(x))
    (gm,) = recorder.graphs
    assert recorder.exponentials == 1
    assert torch.ops.fxparam.matrix_exp in {node.target for node in gm.graph.nodes}


def test_what_was_lowered_by_itself_stays_in_the_report() -> None:
    class Large(Pair):
        def __init__(self) -> None:
            super().__init__(*torch.randn(2, 40, 40) / 40)
            self.large = nn.Parameter(torch.randn(48, 48) / 48)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.matrix_exp(self.large).sum()

    torch.compiler.reset()
    backend = fxparam.backend("eager")
    torch.compile(Large(), backend=backend)(torch.randn(2, 40))
    assert backend.last_report is not None
    assert sum(entry.lowered == ("matrix_exp",) for entry in backend.last_report.entries) == 2


def test_the_report_says_of_each_tensor_of_a_batch_that_it_is_lowered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxparam.lowering.exponential._LEAST_WORK", 1)
    torch.compiler.reset()
    backend = fxparam.backend("eager")
    torch.compile(Layers(), backend=backend)(inputs())
    assert backend.last_report is not None
    assert [entry.lowered for entry in backend.last_report.entries] == [("matrix_exp",)] * 3


def test_the_report_names_them() -> None:
    backend = fxparam.backend("eager")
    torch.compile(Layers(), backend=backend)(inputs())
    assert backend.last_report is not None
    (found,) = backend.last_report.batches
    assert found.names == ("layers.0.weight", "layers.1.weight", "layers.2.weight")
    assert repr(backend.last_report).count("batched with 2 others") == 3


def test_each_is_by_itself_without_the_option() -> None:
    assert compiled_like_eager(Layers(), batch=False).exponentials == 3


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="batch must be True or False: got 1"):
        fxparam.backend(batch=1)  # type: ignore[arg-type]
    assert repr(fxparam.backend(batch=False)) == "fxparam.backend('inductor', batch=False)"
    assert repr(fxparam.backend()) == "fxparam.backend('inductor')"


def test_accesses_of_each_tensor_are_shared_first() -> None:
    def twice(layers: nn.ModuleList, x: Tensor) -> Tensor:
        return in_turn(layers, in_turn(layers, x))

    assert compiled_like_eager(Layers(program=twice)).exponentials == 1


def test_a_computed_weight_without_a_list_is_batched() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.ParameterList(torch.randn(SIZE, SIZE).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for p in self.raw:
                x = x @ torch.matrix_exp(p - p.mT)
            return x

    recorder = Recorder("eager")
    backend = fxparam.backend(recorder)
    check_against_eager(Raw(), backend, inputs())
    assert recorder.exponentials == 1
    assert backend.last_report is not None
    assert backend.last_report.batches[0].names[1] == "matrix_exp(raw.1)"


def test_what_all_read_is_not_stacked() -> None:
    class Around(nn.Module):
        def __init__(self, shared: Tensor) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.shared @ torch.matrix_exp(x)

    shared = nn.Parameter(torch.randn(SIZE, SIZE, dtype=torch.float64))
    recorder = compiled_like_eager(
        Layers(lambda layer: register_parametrization(layer, "weight", Around(shared)))
    )
    assert (recorder.exponentials, recorder.count("stack")) == (1, 1)


def test_chains_of_parametrizations_are_batched() -> None:
    def wrap(layer: nn.Module) -> nn.Module:
        register_parametrization(layer, "weight", LowRank(SIZE).double())
        return exponential(layer)

    assert compiled_like_eager(Layers(wrap)).exponentials == 1


def test_a_parametrized_original_is_batched_too() -> None:
    def wrap(layer: nn.Module) -> nn.Module:
        exponential(layer)
        owner: Any = layer
        register_parametrization(owner.parametrizations.weight, "original", MatrixExponential())
        return layer

    assert compiled_like_eager(Layers(wrap)).exponentials == 2


def both_in_branches(layers: Any, x: Tensor) -> Tensor:
    one, other = layers[0], layers[1]
    return cond(x.sum() > 0, lambda h: other(one(h)), lambda h: one(h) - other(h), x)


def both_in_a_loop(layers: Any, x: Tensor) -> Tensor:
    return map_rows(lambda row: layers[1](torch.tanh(layers[0](row))), x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("program", [both_in_branches, both_in_a_loop])
def test_a_body_that_reads_two_of_a_batch(program: Program, train: bool) -> None:
    """torch takes no two operands on one memory; one of them is a copy."""
    model, recorder = Layers(count=2, program=program), Recorder()
    torch.compiler.reset()
    with torch.set_grad_enabled(train):
        actual = torch.compile(model, backend=fxparam.backend(recorder))(inputs())
        expected = model(inputs())
    torch.testing.assert_close(actual, expected)
    if train:
        originals = list(model.parameters())
        found, wanted = (torch.autograd.grad(y.sum(), originals) for y in (actual, expected))
        torch.testing.assert_close(found, wanted)
    assert recorder.count("stack") == 1


def test_what_left_checkpoints_is_batched() -> None:
    def twice(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(in_turn, layers, x, use_reentrant=False)
        return x

    assert compiled_like_eager(Layers(program=twice)).exponentials == 1


def test_float16_and_bfloat16_are_batched() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matrix_exp(x).to(torch.bfloat16).to(x.dtype)

    wrap: Wrap = lambda layer: register_parametrization(layer, "weight", Cast())  # noqa: E731
    assert compiled_like_eager(Layers(wrap)).exponentials == 1


def test_under_autocast_each_value_has_the_same_dtype() -> None:
    model = Layers(MAPS["orthogonal by exponential"][0]).float()
    twin = copy.deepcopy(model)
    recorder = Recorder("eager")
    compiled = torch.compile(twin, backend=fxparam.backend(recorder))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = model(inputs().float()), compiled(inputs().float())
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)
    assert recorder.exponentials == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_are_batched(mode: Any) -> None:
    recorder, model = Recorder(), Layers()
    with mode():
        actual = torch.compile(model, backend=fxparam.backend(recorder))(inputs())
        torch.testing.assert_close(actual, model(inputs()))
    assert recorder.exponentials == 1


def test_functional_call_is_batched() -> None:
    model, recorder = Layers(), Recorder("eager")
    given = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}

    def call(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (x,))

    actual = torch.compile(call, backend=fxparam.backend(recorder))(given, inputs())
    expected = call(given, inputs())
    torch.testing.assert_close(actual, expected)
    names = list(given.values())
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), names), torch.autograd.grad(expected.sum(), names)
    )
    assert recorder.exponentials == 1


def test_gradients_can_be_differentiated_again() -> None:
    model = Layers()
    x = inputs()

    def penalty(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        weights = [p for n, p in model.named_parameters() if "original" in n]
        first = torch.autograd.grad(run(x).square().sum(), weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), weights))

    compiled = torch.compile(model, backend=fxparam.backend("eager"))
    torch.testing.assert_close(penalty(compiled), penalty(model))


def test_a_batch_fits_into_what_the_graph_holds() -> None:
    each = 50 * SIZE * SIZE * 8  # what an exponential and its backward need at once
    for most, batches in ((3 * each, 2), (each, 6)):
        made = compiled_like_eager(Layers(count=6), max_bytes=most, lower=False)
        assert made.exponentials == batches


def test_a_lowered_batch_works_on_as_many_as_fit() -> None:
    pair, seen = Pair(*torch.randn(2, 64, 64) / 64), Recorder("eager")
    torch.compiler.reset()
    torch.compile(pair, backend=fxparam.backend(seen, max_bytes=300_000))(torch.randn(2, 64))
    (node,) = seen.graphs[0].graph.find_nodes(
        op="call_function", target=torch.ops.fxparam.matrix_exp
    )
    assert node.args[1] == (1 << 18)


# --- left alone --------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two exponentials of originals of different shapes or dtypes."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.matrix_exp(self.first), torch.matrix_exp(self.second)
        return (x.sum() * one).sum() + (x.sum() * other).sum()


@pytest.mark.parametrize(
    "second",
    [
        torch.eye(4, dtype=torch.float64),
        torch.eye(SIZE, dtype=torch.float32),
        torch.eye(SIZE, dtype=torch.float64).expand(2, -1, -1),
    ],
    ids=["size", "dtype", "dimensions"],
)
def test_other_shapes_and_dtypes_are_other_computations(second: Tensor) -> None:
    pair = Pair(torch.eye(SIZE, dtype=torch.float64), second.clone())
    assert compiled_like_eager(pair).exponentials == 2


def test_other_literals_are_other_computations() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return torch.matrix_exp(x * self.scale)

    scales = iter((0.0, -0.0, 1.0))
    wrap: Wrap = lambda layer: register_parametrization(  # noqa: E731
        layer, "weight", Scaled(next(scales))
    )
    assert compiled_like_eager(Layers(wrap)).exponentials == 3


def test_one_that_trains_and_one_that_does_not_are_two() -> None:
    model = Layers()
    layer: Any = model.layers[1]
    layer.parametrizations.weight.original.requires_grad_(False)
    recorder = Recorder("eager")
    compiled = torch.compile(model, backend=fxparam.backend(recorder))
    torch.testing.assert_close(compiled(inputs()), model(inputs()))
    assert recorder.exponentials == 2  # the two that train are one


def with_grad_off_for_one(layers: nn.ModuleList, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = x + layers[0](x)
    return in_turn([layers[1], layers[2]], x)


def one_returned(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    return in_turn(layers, x), layers[0].weight


def original_written(layers: Any, x: Tensor) -> Tensor:
    x = layers[0](x)
    with torch.no_grad():
        layers[2].parametrizations.weight.original.mul_(0.5)
    return layers[2](layers[1](x))


def value_written(layers: Any, x: Tensor) -> Tensor:
    return x @ layers[0].weight.mul_(2) @ layers[1].weight @ layers[2].weight


def another_computed_first(layers: Any, x: Tensor) -> Tensor:
    first = layers[0].weight
    return x @ first @ torch.matrix_exp(first @ x.mT @ x) @ layers[1].weight @ layers[2].weight


def hooked(layers: Any, x: Tensor) -> Tensor:
    first = layers[0].weight
    first.register_hook(lambda grad: grad * 3)
    return x @ first @ layers[1].weight @ layers[2].weight


def one_detached(layers: Any, x: Tensor) -> Tensor:
    return x @ layers[0].weight.detach() @ layers[1].weight @ layers[2].weight


def one_read_by_its_place(layers: Any, x: Tensor) -> Tensor:
    first = layers[2].weight.mT.as_strided((SIZE, SIZE), (SIZE, 1), 0)
    return x @ layers[0].weight @ layers[1].weight @ first


KEPT: dict[str, tuple[Program, int]] = {
    "a value is read by its place in memory": (one_read_by_its_place, 2),
    "one is read without gradients": (with_grad_off_for_one, 2),
    "an original is written in between": (original_written, 2),
    "a value is written": (value_written, 2),
    "a value has no gradient": (one_detached, 2),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", KEPT)
def test_one_is_left_out_and_the_others_are_one(name: str, inner: str) -> None:
    program, exponentials = KEPT[name]
    assert compiled_like_eager(Layers(program=program), inner).exponentials == exponentials


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_value_with_a_hook_is_left_out(inner: str) -> None:
    recorder = compiled_like_eager(Layers(program=hooked), inner)
    # Torch 2.11 calls a function of the value, whose backward runs the hook.
    assert recorder.exponentials == 1 + recorder.count("register_hook")


def test_a_returned_value_is_left_out() -> None:
    recorder, model = Recorder("eager"), Layers(program=one_returned)
    y, weight = torch.compile(model, backend=fxparam.backend(recorder))(inputs())
    with torch.no_grad():
        weight.zero_()
    torch.testing.assert_close(y, in_turn(model.layers, inputs()))
    assert recorder.exponentials == 2


def test_values_of_two_results_are_two() -> None:
    """If the caller differentiates one result, the other's originals have no gradient."""

    def two(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        return layers[0](x), layers[1](x)

    model = Layers(program=two)
    recorder = Recorder("eager")
    y, _ = torch.compile(model, backend=fxparam.backend(recorder))(inputs())
    y.sum().backward()
    layer: Any = model.layers[1]
    assert layer.parametrizations.weight.original.grad is None
    assert recorder.exponentials == 3 - 1


def test_random_evaluations_are_left_alone() -> None:
    def wrap(layer: nn.Module) -> nn.Module:
        exponential(layer)
        return register_parametrization(layer, "weight", RandomMask())

    assert compiled_like_eager(Layers(wrap)).exponentials == 3


def test_spectral_norm_in_training_is_left_alone() -> None:
    recorder = compiled_like_eager(Layers(spectral_norm))
    assert recorder.count("stack") == 0


def test_an_op_without_a_batching_rule_is_named() -> None:
    def wrapped(layer: nn.Module) -> nn.Module:
        exponential(layer)
        return register_parametrization(layer, "weight", Counting())

    recorder = Recorder("eager")
    backend = fxparam.backend(recorder)
    check_against_eager(Layers(wrapped), backend, inputs())
    assert recorder.count("stack") == 0
    assert backend.last_report is not None
    (found,) = backend.last_report.batches
    assert found.refused.endswith("has no batching rule")
    assert repr(backend.last_report).count("not batched: ") == 3


# Its name is that of an op which its rule calls.
@torch.library.custom_op("fxparam_tests::round", mutates_args=())
def rounded(x: Tensor) -> Tensor:
    return (8 * x).round() / 8


rounded.register_fake(torch.empty_like)
rounded.register_autograd(lambda ctx, gradient: gradient)  # straight through


@rounded.register_vmap
def _(info: Any, places: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return (8 * x).round() / 8, places[0]  # whose derivative is zero


def test_a_batching_rule_has_not_the_backward_of_its_op() -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matrix_exp(rounded(x))

    def wrap(layer: nn.Module) -> nn.Module:
        return register_parametrization(layer, "weight", Rounded())

    recorder = compiled_like_eager(Layers(wrap))
    assert recorder.exponentials == 3
    model, recorder = Layers(wrap), Recorder()
    with torch.no_grad():
        torch.compile(model, backend=fxparam.backend(recorder))(inputs())
    assert recorder.exponentials == 1


def test_tied_tensors_are_shared_and_not_batched() -> None:
    model = Layers(count=2)
    first: Any
    second: Any
    first, second = model.layers
    second.parametrizations.weight.original = first.parametrizations.weight.original
    recorder = compiled_like_eager(model)
    assert (recorder.exponentials, recorder.count("stack")) == (1, 0)


def test_evaluations_in_the_body_of_a_loop_are_left_there() -> None:
    """Two originals that a loop writes stay in its body, where nothing is batched."""

    def looped(layers: Any, x: Tensor) -> Tensor:
        one, other = layers[0].bias.diag(), layers[1].bias.diag()

        def step(i: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return i + 1, torch.matrix_exp(a) / 2, torch.matrix_exp(b) / 2

        def go_on(i: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return i < 2

        with torch.no_grad():
            start = torch.zeros((), dtype=torch.int64)
            _, a, b = torch.while_loop(go_on, step, (start, one, other))
        return x @ a @ b

    model, recorder = Layers(count=2, program=looped), Recorder("eager")
    actual = torch.compile(model, backend=fxparam.backend(recorder))(inputs())
    torch.testing.assert_close(actual, model(inputs()))
    assert recorder.exponentials == 2


def test_dynamic_shapes_are_like_eager() -> None:
    model = Layers()
    recorder = Recorder()
    compiled = torch.compile(model, backend=fxparam.backend(recorder), dynamic=True)
    for rows in (2, 5):
        x = torch.randn(rows, SIZE, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert recorder.exponentials == len(recorder.graphs)


def test_a_graph_that_takes_gradients_is_left_alone() -> None:
    def gradients(layers: Any, x: Tensor) -> Tensor:
        y = in_turn(layers, x)
        originals = [layer.parametrizations.weight.original for layer in layers]
        return sum(g.sum() for g in torch.autograd.grad(y.sum(), originals))  # type: ignore[return-value]

    model = Layers(program=gradients)
    actual = torch.compile(model, backend=fxparam.backend("eager"))(inputs())
    torch.testing.assert_close(actual, model(inputs()))


def test_large_matrices_are_left_alone_on_a_cpu() -> None:
    pair = Pair(*torch.randn(2, 160, 160, dtype=torch.float64) / 160)
    recorder = Recorder("eager")
    backend = fxparam.backend(recorder)
    torch.compile(pair, backend=backend)(inputs())
    assert recorder.exponentials == 2
    assert backend.last_report is not None
    assert backend.last_report.batches[0].refused == "not worthwhile at this size"


def test_pointwise_evaluations_are_left_alone() -> None:
    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.softplus(x) + 1

    backend = fxparam.backend("eager")
    wrap: Wrap = lambda layer: register_parametrization(layer, "weight", Softplus())  # noqa: E731
    torch.compile(Layers(wrap), backend=backend)(inputs())
    assert backend.last_report is not None
    assert backend.last_report.batches == ()


def test_the_graph_of_many_layers_is_smaller() -> None:
    sizes = Counter[bool]()
    for batch in (False, True):
        torch.compiler.reset()
        recorder = Recorder("eager")
        backend = fxparam.backend(recorder, batch=batch)
        torch.compile(Layers(MAPS["orthogonal by exponential"][0], 16), backend=backend)(inputs())
        calls = (n for gm in recorder.graphs for n in gm.graph.nodes if n.op.startswith("call"))
        sizes[batch] = sum(1 for _ in calls)
    assert sizes[True] < sizes[False] * 0.75
