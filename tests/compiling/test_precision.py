"""Gradients of shared values of reduced precision, and sizes that data decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxparam
from fxparam.graph import Rule
from tests import helpers


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, w: Tensor) -> Tensor:
        return w.to(self.dtype)


def _layer(*steps: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    for step in steps:
        fxparam.register_parametrization(layer, "weight", step, unsafe=True)
    return layer


def _gradient(layer: nn.Module, xs: Tensor, scale: float, backend: Any) -> Tensor:
    def loss(xs: Tensor) -> Tensor:
        return torch.stack([layer(x).float().sum() for x in xs]).sum()

    layer.zero_grad()
    run = loss if backend is None else torch.compile(loss, backend=backend)
    (run(xs) * scale).backward()
    gradient: Any = layer.parametrizations.weight.original.grad  # type: ignore[union-attr]
    return gradient.clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("dtype", "steps", "scale"), [(torch.float16, 16, 4096.0), (torch.bfloat16, 300, 1.0)]
)
def test_a_sum_of_gradients_is_as_precise_as_the_original(
    dtype: torch.dtype, steps: int, scale: float
) -> None:
    layer = _layer(helpers.Counting(), _Cast(dtype))
    xs = torch.rand(steps, 4, 8).to(dtype)
    exact = _gradient(layer, xs, scale, None)
    fx = fxparam.backend("aot_eager")
    torch.testing.assert_close(_gradient(layer, xs, scale, fx), exact)
    assert torch.isfinite(exact).all()
    # The part in full precision is shared all the same.
    assert helpers.counted(lambda: _gradient(layer, xs, scale, fx)) == (1, 1)
    (entry,) = fx.last_report.entries  # type: ignore[union-attr]
    assert {refusal.rule for refusal in entry.refused} == {Rule.REDUCED}


def test_a_sum_that_passes_through_few_bits_is_as_precise_as_the_original() -> None:
    layer = _layer(helpers.Counting(), _Cast(torch.float16), _Cast(torch.float32))
    xs = torch.rand(16, 4, 8)
    exact = _gradient(layer, xs, 4096.0, None)
    fx = fxparam.backend("aot_eager")
    assert helpers.counted(lambda: _gradient(layer, xs, 4096.0, fx)) == (1, 1)
    torch.testing.assert_close(_gradient(layer, xs, 4096.0, fx), exact)
    assert torch.isfinite(exact).all()
    # Rounded to bfloat16 a sum is not too large, and the evaluation is shared whole.
    layer = _layer(helpers.Counting(), _Cast(torch.bfloat16), _Cast(torch.float32))
    exact = _gradient(layer, xs, 1.0, None)
    torch.testing.assert_close(_gradient(layer, xs, 1.0, fx), exact, rtol=2**-7, atol=0)
    (entry,) = fx.last_report.entries  # type: ignore[union-attr]
    assert entry.evaluations == 1
    assert not entry.refused


def _sum(layer: nn.Module, xs: Tensor) -> Tensor:
    return torch.stack([layer(xs[i]).float().sum() for i in range(len(xs))]).sum()


@torch.compiler.nested_compile_region
def _region(layer: nn.Module, xs: Tensor) -> Tensor:
    return _sum(layer, xs)


def _checkpointed(layer: nn.Module, xs: Tensor) -> Tensor:
    return checkpoint(_sum, layer, xs, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [_checkpointed, _region])
@pytest.mark.parametrize("calls", [1, 2])
def test_so_is_one_over_the_readers_in_a_body(body: Any, calls: int) -> None:
    layer = _layer(helpers.Counting(), _Cast(torch.float16))
    xs = torch.rand(16, 4, 8).to(torch.float16)

    def loss(xs: Tensor) -> Tensor:
        parts = [body(layer, part) for part in xs.chunk(calls)]
        return torch.stack(parts).sum() * 4096

    gradients = []
    for run in (loss, torch.compile(loss, backend=fxparam.backend("aot_eager"), fullgraph=True)):
        layer.zero_grad()
        run(xs).backward()
        original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
        gradients.append(original.grad.clone())
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_what_is_computed_in_reduced_precision_on_the_way_is_shared() -> None:
    """LoRA under autocast: the product of the thin matrices is bfloat16, the weight float32."""
    layer = _layer(helpers.LowRank(8), helpers.Counting())
    twin = copy.deepcopy(layer)

    def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                for _ in range(3):
                    x = model(x)
            return x.float().sum()

        return call

    compiled = torch.compile(run(twin), backend=fxparam.backend("aot_eager"))
    x = torch.rand(2, 8)
    run(layer)(x).backward()
    assert helpers.counted(lambda: compiled(x).backward()) == (1, 1)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=2e-2)


def test_a_model_of_bfloat16_is_shared_whole() -> None:
    layer = _layer(helpers.MatrixExponential(), helpers.Counting()).to(torch.bfloat16)
    xs = torch.rand(4, 4, 8).to(torch.bfloat16)
    fx = fxparam.backend("aot_eager")
    _gradient(layer, xs, 1.0, fx)
    assert helpers.counted(lambda: _gradient(layer, xs, 1.0, fx)) == (1, 1)


SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda w: w[w > 0],
    "masked_select": lambda w: torch.masked_select(w, w > 0),
    "nonzero": lambda w: w.flatten()[torch.nonzero(w.flatten() > 0)[:, 0]],
    "unique": lambda w: torch.unique(w.round()),
    "bincount": lambda w: torch.bincount(w.abs().long().flatten()).to(w.dtype),
    "item": lambda w: w + (w > 0).sum().item(),
}


@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS.keys())
@pytest.mark.parametrize("which", [0, 1], ids=["the first is written", "the second is written"])
def test_sizes_that_data_decide(select: Callable[[Tensor], Tensor], which: int) -> None:
    layer = _layer(helpers.MatrixExponential())

    def run(x: Tensor) -> Tensor:
        both = [select(layer.weight), select(layer.weight)]
        both[which].mul_(2)
        return x * both[0].sum() + both[1].sum()

    x = torch.ones(3)
    settings = dict.fromkeys(("capture_dynamic_output_shape_ops", "capture_scalar_outputs"), True)
    with torch.no_grad(), torch._dynamo.config.patch(settings):
        compiled = torch.compile(run, backend=fxparam.backend("aot_eager"), fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))


def test_a_selection_alone_reads_the_shared_value() -> None:
    layer = _layer(helpers.Counting())

    def run(x: Tensor) -> Tensor:
        return (x @ layer.weight).sum() + layer.weight[layer.weight > 0].sum()

    x = torch.ones(2, 8)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend=fxparam.backend("aot_eager"), fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))
        assert helpers.counted(lambda: compiled(x))[0] == 1
