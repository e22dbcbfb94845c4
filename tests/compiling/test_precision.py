"""Gradients of shared values of reduced precision, and sizes that data decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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

    twin = layer
    twin.zero_grad()
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
