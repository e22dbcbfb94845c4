"""What single nodes are seen to do: a matrix of torch-level calls on one fake tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxparam
from fxparam.graph import Effects, analyze
from fxparam.graph.analysis import op_effects


def _last(call: Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node]) -> tuple[Effects, int]:
    """The effects of a node built on one tensor of shape (3, 3), and that tensor's storage."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["example_value"] = torch.empty(3, 3)
        node = call(graph, x)
        args = torch.fx.map_arg(node.args, lambda n: n.meta["example_value"])
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: n.meta["example_value"])
        run: Any = node.target
        if node.op == "call_method":
            run = getattr(torch.Tensor, run)
        node.meta["example_value"] = run(*args, **kwargs)
    graph.output(node)
    table = analyze(torch.fx.GraphModule({}, graph))
    (storage,) = table.of[x].storages
    return table.of[node], storage


def _function(target: Any, *rest: Any, **kwargs: Any) -> Any:
    return lambda graph, x: graph.call_function(target, (x, *rest), kwargs)


def _method(name: str, *rest: Any, **kwargs: Any) -> Any:
    return lambda graph, x: graph.call_method(name, (x, *rest), kwargs)


FRESH = {
    "exp": _function(torch.exp),
    "F.relu": _function(F.relu),
    "clone": _method("clone"),
}
VIEWS = {
    "mT": _function(getattr, "mT"),
    "view": _method("view", 9),
    "detach": _method("detach"),
    "contiguous of a contiguous tensor": _method("contiguous"),
    "to its own dtype": _method("to", torch.float32),
    "dropout, not training": _function(F.dropout, 0.5, False),
}
WRITES = {
    "add_": _method("add_", 1.0),
    "F.relu(inplace=True)": _function(F.relu, inplace=True),
    "operator.iadd": _function(operator.iadd, 1.0),
    "out=": lambda graph, x: graph.call_function(torch.exp, (x,), {"out": x}),
    "F.normalize(out=)": lambda graph, x: graph.call_function(F.normalize, (x,), {"out": x}),
    "zero_ of ATen": _function(torch.ops.aten.zero_.default),
    "requires_grad_": _method("requires_grad_"),
    "t_": _method("t_"),
}
RANDOM = {
    "dropout": _function(F.dropout, 0.5, True),
    "rand_like": _function(torch.rand_like),
    "bernoulli": _method("bernoulli"),
    "normal_": _method("normal_"),
    "multinomial": _function(torch.multinomial, 1),
    "rrelu": _function(F.rrelu, training=True),
    "gumbel_softmax": _function(F.gumbel_softmax),
}


@pytest.mark.parametrize("name", FRESH)
def test_pure_ops_give_fresh_storage(name: str) -> None:
    effects, storage = _last(FRESH[name])
    assert effects.pure and storage not in effects.storages


@pytest.mark.parametrize("name", VIEWS)
def test_views_live_in_their_base(name: str) -> None:
    effects, storage = _last(VIEWS[name])
    assert effects.pure and effects.storages == {storage}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name: str) -> None:
    effects, storage = _last(WRITES[name])
    assert not effects.pure and storage in effects.writes


@pytest.mark.parametrize("name", RANDOM)
def test_random_draws_are_seen(name: str) -> None:
    effects, _ = _last(RANDOM[name])
    assert effects.random and not effects.pure


BATCH_NORMS = {
    "F.batch_norm": lambda g, x, s, train: g.call_function(
        F.batch_norm, (x, s, s), {"training": train}
    ),
    "torch.batch_norm": lambda g, x, s, train: g.call_function(
        torch.batch_norm, (x, None, None, s, s, train, 0.1, 1e-5, False)
    ),
    "native_batch_norm": lambda g, x, s, train: g.call_function(
        torch.native_batch_norm, (x, None, None, s, s, train, 0.1, 1e-5)
    ),
    "F.instance_norm": lambda g, x, s, train: g.call_function(
        F.instance_norm, (x, s, s), {"use_input_stats": train}
    ),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_running_statistics_are_written_in_training_whatever_schemas_say(
    name: str, train: bool
) -> None:
    graph = torch.fx.Graph()
    x, statistic = graph.placeholder("x"), graph.placeholder("statistic")
    with FakeTensorMode():
        x.meta["example_value"] = torch.empty(2, 3, 4)
        statistic.meta["example_value"] = torch.empty(3)
        node = BATCH_NORMS[name](graph, x, statistic, train)
        node.meta["example_value"] = node.target(
            *torch.fx.map_arg(node.args, lambda n: n.meta["example_value"]), **node.kwargs
        )
    graph.output(node)
    table = analyze(torch.fx.GraphModule({}, graph))
    assert (table.of[statistic].storages <= table.of[node].writes) == train
    assert table.of[node].pure != train


@torch.library.custom_op("fxparam_test::writes_its_first", mutates_args=("x",))
def _writes_its_first(x: Tensor) -> None:
    x.zero_()


def test_custom_ops_do_what_they_declare() -> None:
    effects, storage = _last(_function(torch.ops.fxparam_test.writes_its_first.default))
    assert storage in effects.writes


def test_what_cannot_run_on_fakes_writes_what_it_declares() -> None:
    graph = torch.fx.Graph()
    scale, picked = graph.placeholder("scale"), graph.placeholder("picked")
    product = graph.call_function(torch.mul, (scale, picked))
    graph.output(product)
    with FakeTensorMode(shape_env=ShapeEnv()):
        scale.meta["example_value"] = torch.empty(())
        picked.meta["example_value"] = torch.empty(3)[torch.empty(3) > 0]  # of a size not known
        product.meta["example_value"] = scale.meta["example_value"] * picked.meta["example_value"]
    effects = analyze(torch.fx.GraphModule({}, graph)).of[product]
    assert not effects.known and not effects.writes


def test_results_of_a_function_that_are_views_of_each_other_are_written_together() -> None:
    forward = torch.fx.Graph()
    doubled = forward.call_method("mul", (forward.placeholder("x"), 2))
    forward.output(((doubled, forward.call_function(getattr, (doubled, "mT"))), ()))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    bodies = [graph.get_attr(name) for name in ("fwd", "bwd")]
    both = graph.call_function(torch.ops.higher_order.autograd_function_apply, (*bodies, x))
    graph.output(both)
    with FakeTensorMode():
        fake = torch.empty(3, 3)
        for node in (*forward.find_nodes(op="placeholder"), doubled, x):
            node.meta["example_value"] = fake if node.op == "placeholder" else fake * 2
        next(iter(doubled.users)).meta["example_value"] = doubled.meta["example_value"].mT
        both.meta["example_value"] = (torch.empty(3, 3), torch.empty(3, 3))
    body = torch.fx.GraphModule({}, forward)
    one, other = analyze(torch.fx.GraphModule({"fwd": body, "bwd": body}, graph)).of[both].values
    assert one & other


def test_what_is_not_torchs_may_write_anything() -> None:
    effects, _ = _last(_function(_not_torchs))
    assert effects.writes_all and not effects.pure


def _not_torchs(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize("place", [2, -1])
def test_one_of_several_results_is_that_one(place: int) -> None:
    graph = torch.fx.Graph()
    with FakeTensorMode() as mode:
        x = graph.placeholder("x")
        x.meta["example_value"] = mode.from_tensor(torch.ones(3, 2))
        parts = graph.call_function(torch.svd, (x,))
        parts.meta["example_value"] = torch.svd(x.meta["example_value"])
        part = graph.call_function(operator.getitem, (parts, place))
        part.meta["example_value"] = parts.meta["example_value"][place]
    graph.output(part)
    table = analyze(torch.fx.GraphModule({}, graph))
    assert table.of[part].pure
    assert table.of[part].values == (table.of[parts].values[2],)


def test_rows_are_taken_without_running_ops_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over as many rows as there are would cost their square."""
    observed = []
    observe = op_effects._observe
    monkeypatch.setattr(op_effects, "_observe", lambda n, m: observed.append(n) or observe(n, m))
    graph = torch.fx.Graph()
    with FakeTensorMode() as mode:
        x = graph.placeholder("x")
        x.meta["example_value"] = mode.from_tensor(torch.ones(50, 2))
        rows = graph.call_function(torch.unbind, (x,))
        rows.meta["example_value"] = torch.unbind(x.meta["example_value"])
        taken = [graph.call_function(operator.getitem, (rows, i)) for i in range(50)]
        for row, value in zip(taken, rows.meta["example_value"], strict=True):
            row.meta["example_value"] = value
    graph.output(tuple(taken))
    table = analyze(torch.fx.GraphModule({}, graph))
    assert observed == [rows]
    assert all(table.of[row].values[0] >= table.of[x].values[0] for row in taken)


def test_fakes_may_have_other_strides() -> None:
    """Batch norm of a transposed matrix gives rows in memory, and a fake says columns.

    The reshape is thus a view of what backward needs, and the caller writes it.
    """

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, dtype=torch.float64).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.t())  # type: ignore[no-any-return]

    layer = nn.Linear(2, 2, dtype=torch.float64)
    fxparam.register_parametrization(layer, "weight", Normalized()).eval()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), layer.weight.reshape(-1)

    gradients = []
    for each in (forward, torch.compile(forward, backend=fxparam.backend("eager"))):
        x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        y, flat = each(x)
        with torch.no_grad():
            flat.mul_(2)
        gradients.append(torch.autograd.grad(y.sum(), x))
    torch.testing.assert_close(*gradients)


class _Counting(torch.Tensor):
    """Holds one tensor, and writes it whenever an op is done."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _Counting:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> _Counting:
        return _Counting(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args[0].held.add_(1)
        return _Counting(args[0].held.clone())


def test_what_a_subclass_of_others_does_is_not_known() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = _Counting(torch.ones(2))
    node = graph.call_function(torch.sin, (x,))
    graph.output(node)
    assert not op_effects.Ops().effects(node).known
