"""``fxparam.parametrizations`` is a drop-in for ``torch.nn.utils.parametrizations``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs

import fxparam
from fxparam import parametrizations as ours

CASES: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "exponential": ("orthogonal", lambda: nn.Linear(48, 48), {}),
    "rectangular exponential": (
        "orthogonal",
        lambda: nn.Linear(32, 40),
        {"orthogonal_map": "matrix_exp"},
    ),
    "complex": ("orthogonal", lambda: nn.Linear(48, 48, dtype=torch.complex64), {}),
    "tall": ("orthogonal", lambda: nn.Linear(5, 8), {}),
    "wide": ("orthogonal", lambda: nn.Linear(8, 5), {}),
    "reflectors alone": (
        "orthogonal",
        lambda: nn.Linear(8, 8),
        {"orthogonal_map": "householder", "use_trivialization": False},
    ),
    "cayley": ("orthogonal", lambda: nn.Linear(6, 6), {"orthogonal_map": "cayley"}),
    "weight norm": ("weight_norm", lambda: nn.Conv1d(3, 4, 2), {"dim": 1}),
    "one norm": ("weight_norm", lambda: nn.Linear(3, 4), {"dim": None}),
    "spectral norm": ("spectral_norm", lambda: nn.Linear(3, 4), {"n_power_iterations": 2}),
    "transposed": ("spectral_norm", lambda: nn.ConvTranspose1d(3, 4, 2), {}),
}


def _made(kind: Any, case: str) -> nn.Module:
    name, make, options = CASES[case]
    torch.manual_seed(0)
    module: nn.Module = getattr(kind, name)(make(), **options)
    with torch.no_grad():
        for original in module.parametrizations.weight.parameters(recurse=False):
            original.add_(torch.randn_like(original) * 0.1)
    return module


def _read(module: nn.Module) -> list[torch.Tensor]:
    """Return the weight, and the gradients of the originals."""
    weight = module.weight
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    originals = list(module.parametrizations.weight.parameters(recurse=False))
    return [weight.detach(), *torch.autograd.grad(weight, originals, cotangent)]


@pytest.mark.parametrize("case", CASES)
def test_the_same_values_gradients_and_state(case: str) -> None:
    one, other = _made(theirs, case), _made(ours, case)
    assert list(one.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(other.state_dict(), one.state_dict())
    torch.testing.assert_close(_read(other), _read(one), rtol=1e-4, atol=1e-5)
    assert repr(other) == repr(one)


@pytest.mark.parametrize("case", CASES)
def test_state_is_interchanged_and_pickled(case: str) -> None:
    one, other = _made(theirs, case).eval(), _made(ours, case).eval()
    with torch.no_grad():
        for original in other.parametrizations.weight.parameters(recurse=False):
            original.mul_(1.5)
    one.load_state_dict(other.state_dict())
    other.load_state_dict(one.state_dict())
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        torch.testing.assert_close(copied.weight, one.weight, rtol=1e-4, atol=1e-5)


def test_old_state_dicts_of_weight_norm_load() -> None:
    old = {"bias": torch.ones(4), "weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3)}
    layer = ours.weight_norm(nn.Linear(3, 4))
    layer.load_state_dict(old)
    torch.testing.assert_close(layer.weight, torch.full((4, 3), 3**-0.5))


@pytest.mark.parametrize(
    ("register", "options", "error"),
    [
        (ours.orthogonal, {"name": "wait"}, "required: a parameter or buffer 'wait' of Linear"),
        (ours.orthogonal, {"name": "bias"}, "required: at least 2 dimensions"),
        (ours.orthogonal, {"orthogonal_map": "qr"}, "must be one of 'matrix_exp', 'cayley'"),
        (ours.weight_norm, {"name": "wait"}, "found: None"),
        (ours.spectral_norm, {"n_power_iterations": 0}, "n_power_iterations"),
        (ours.spectral_norm, {"dim": 2}, "Dimension out of range"),
    ],
)
def test_refused_calls_change_nothing(register: Any, options: Any, error: str) -> None:
    layer = nn.Linear(3, 3)
    before = dict(layer.named_parameters())
    with pytest.raises((ValueError, IndexError), match=error):
        register(layer, **options)
    assert type(layer) is nn.Linear and dict(layer.named_parameters()) == before


def test_complex_reflectors_are_refused() -> None:
    layer = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex"):
        ours.orthogonal(layer, orthogonal_map="householder")
    assert not fxparam.is_parametrized(layer)


@pytest.mark.parametrize("case", ["exponential", "tall"])
def test_eager_code_computes_with_the_cheaper_forms(case: str) -> None:
    layer = _made(ours, case)
    seen = {node.name() for node in _nodes(layer.weight.grad_fn)}
    assert not any(torchs in name for name in seen for torchs in ("LinalgMatrixExp", "Householder"))


def _nodes(node: Any) -> set[Any]:
    found, work = set(), [node]
    while work:
        node = work.pop()
        if node is not None and node not in found:
            found.add(node)
            work += [after for after, _ in node.next_functions]
    return found


@pytest.mark.parametrize("case", ["exponential", "tall"])
def test_compiled_and_traced(case: str) -> None:
    torch.compiler.reset()
    layer = _made(ours, case)
    x = torch.randn(2, layer.in_features)
    fx = fxparam.backend("aot_eager")
    compiled = torch.compile(layer, backend=fx, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert "lowered" in repr(fx.last_report)
    traced = fxparam.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), layer(x))
    targets = {str(node.target) for node in traced.graph.nodes}
    assert not any("fxparam" in target for target in targets)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are compared, as in torch
@pytest.mark.parametrize("map_", ["matrix_exp", "householder"])
def test_a_wide_matrix_is_traced_as_torchs_is(map_: str) -> None:
    layer = ours.orthogonal(nn.Linear(40, 34), orthogonal_map=map_)
    x = torch.randn(2, 40)
    torch.testing.assert_close(fxparam.symbolic_trace(layer)(x), layer(x))
    traced = torch.jit.trace(layer, x)  # checks that a second trace is equal
    assert "fxparam::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("map_", ["matrix_exp", "householder", "cayley"])
def test_meta_tensors(map_: str) -> None:
    layer = ours.orthogonal(nn.Linear(6, 4), orthogonal_map=map_).to("meta")
    assert layer.weight.is_meta and layer.weight.shape == (4, 6)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_torchs_ops(strict: bool) -> None:
    layer = _made(ours, "exponential")
    x = torch.randn(2, 48)
    program = torch.export.export(layer, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("aten" in target and "matrix_exp" in target for target in targets)
    assert not any("fxparam" in target for target in targets)
    torch.testing.assert_close(program.module()(x), layer(x))
