"""``torch.compiler.precompile``, which torch has since 2.15 and which calls no backend of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxparam
from tests import helpers

precompile: Any = pytest.importorskip("torch.compiler.precompile", reason="torch 2.15 and newer")
if not hasattr(precompile, "capture"):
    pytest.skip("torch 2.15 and newer", allow_module_level=True)

X = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return helpers.Loop(
        lambda cell: parametrize.register_parametrization(cell, "weight", helpers.Counting())
    )


def _loaded(call: Callable[..., Tensor], model: nn.Module, folder: Path) -> Any:
    paths = {"artifact_path": folder / "m.py", "cache_path": folder / "m.cache"}
    with torch.no_grad(), precompile.capture(call, **paths, backend="eager") as capture:
        capture(model, X)
    return precompile.load(*paths.values())


def _cached(model: nn.Module, x: Tensor) -> Tensor:
    with fxparam.cached():
        return model(x)  # type: ignore[no-any-return]


def _check(run: Any, model: nn.Module, evaluations: int) -> None:
    with torch.no_grad():
        torch.testing.assert_close(run(model, X), _model()(X))
        assert helpers.counted(lambda: run(model, X)) == (evaluations, 0)


def test_as_it_is_nothing_is_shared(tmp_path: Path) -> None:
    model = _model()
    _check(_loaded(lambda model, x: model(x), model, tmp_path), model, 6)
    with pytest.raises(ValueError, match="fxparam"):
        precompile.capture(
            _cached, artifact_path=tmp_path / "a", cache_path=tmp_path / "b", backend="fxparam"
        )


def test_adopted_parametrizations_are_shared_in_a_region(tmp_path: Path) -> None:
    model = _model()
    fxparam.adopt(model)
    _check(_loaded(_cached, model, tmp_path), model, 1)


def test_a_traced_graph_is_captured_as_it_is(tmp_path: Path) -> None:
    gm = fxparam.symbolic_trace(_model(), example_inputs=(X,))
    _check(_loaded(lambda model, x: model(x), gm, tmp_path), gm, 1)
