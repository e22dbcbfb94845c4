"""Parametrized models on a GPU: numbers, kernels, precisions, CUDA graphs and autotuning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxparam
from fxparam.explaining.example import Example
from fxparam.explaining.generated import count
from fxparam.explaining.kernels import generated_by
from tests.triton.cases import CASES, SIZE, Case, error, results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRAINED = [name for name, case in CASES.items() if case.trains]


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _model(case: Case, *, by_hand: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return case.model(by_hand=by_hand).cuda()


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, SIZE).to("cuda", dtype)


def _errors(case: Case, **options: Any) -> tuple[float, float]:
    """Return the errors of the compiled model and of eager, against float64."""
    model, x = _model(case), _input()
    exact_model = copy.deepcopy(model).double()
    exact = results(case, exact_model, exact_model, x.double())
    compiled = torch.compile(model, backend="fxparam", fullgraph=True, **options)
    ours = [results(case, model, compiled, x) for _ in range(3)]  # CUDA graphs record, then replay
    eager = error(results(case, model, model, x), exact)
    return max(error(each, exact) for each in ours), eager


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_eager(case: str) -> None:
    ours, eager = _errors(CASES[case])
    assert ours <= max(4 * eager, 1e-6)


@pytest.mark.parametrize("case", ["orthogonal", "weight norm", "batch"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_as_exact_under_modes(case: str, mode: str) -> None:
    ours, eager = _errors(CASES[case], mode=mode)
    assert ours <= max(4 * eager, 1e-6)


@pytest.mark.parametrize("case", TRAINED)
def test_as_exact_with_tf32(case: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        ours, eager = _errors(CASES[case])
    finally:
        torch.set_float32_matmul_precision(before)
    assert ours <= max(4 * eager, 1e-6)


@pytest.mark.parametrize("case", TRAINED)
def test_as_exact_under_autocast_to_bfloat16(case: str) -> None:
    model, x = _model(CASES[case]), _input()
    with torch.autocast("cuda", torch.bfloat16):
        compiled = torch.compile(model, backend="fxparam")
        ours = results(CASES[case], model, compiled, x)
        eager = results(CASES[case], model, model, x)
    exact_model = _model(CASES[case]).double()
    exact = results(CASES[case], exact_model, exact_model, x.double())
    assert error(ours, exact) <= max(2 * error(eager, exact), 1e-2)


@pytest.mark.parametrize("case", ["orthogonal", "weight norm", "LoRA", "batch"])
def test_fewer_calls_than_inductor_and_no_more_than_by_hand(case: str) -> None:
    def calls(backend: str, *, by_hand: bool = False) -> int:
        made = lambda: Example(_model(CASES[case], by_hand=by_hand), (_input(),))  # noqa: E731
        counts = count(generated_by(backend, made))
        assert "Triton" in counts.languages
        return counts.launches + counts.extern_calls

    ours = calls("fxparam")
    assert ours < calls("inductor")
    assert ours <= calls("inductor", by_hand=True)


def test_a_frozen_model_in_cuda_graphs_sees_new_weights() -> None:
    torch.manual_seed(0)
    model = weight_norm(nn.Linear(SIZE, SIZE)).cuda().eval()
    compiled, x = fxparam.compile(model, scope="frozen", mode="reduce-overhead"), _input()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x).clone(), model(x))
        model.parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(compiled(x).clone(), model(x))
