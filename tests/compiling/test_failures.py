"""A pass that fails: an error in strict mode; else a warning, and the graph as it was captured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxparam
from fxparam.graph.passes import share as share_module
from tests import helpers

X = torch.randn(2, 5, dtype=torch.float64)


def _wrap(cell: nn.Module) -> None:
    for step in (helpers.MatrixExponential(), helpers.Counting()):
        fxparam.register_parametrization(cell, "weight", step)


def _broken(table: Any, node: Node) -> Any:
    raise KeyError("oops")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pass that shares fail on the first node it looks at."""
    monkeypatch.setattr(share_module, "has_effects", _broken)


@pytest.mark.usefixtures("broken")
def test_users_lose_speed_and_no_run() -> None:
    model = helpers.Loop(_wrap)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=fxparam.backend("aot_eager", strict=False))
    with pytest.warns(RuntimeWarning, match="(?s)pass share failed on node .*compiled unshared"):
        compiled(X).sum().backward()
    model(X).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    assert helpers.counted(lambda: compiled(X).sum().backward())[1] == 6


@pytest.mark.usefixtures("broken")
def test_a_region_is_what_it_is_in_eager_code_then() -> None:
    model = helpers.Loop(_wrap)

    def run(x: Tensor) -> Tensor:
        with fxparam.cached():
            y = model(x)
            model.calls = 1  # so that the backend is to share what follows
            return y + model(x)  # type: ignore[no-any-return]

    compiled = torch.compile(run, backend=fxparam.backend("eager", strict=False))
    with pytest.warns(RuntimeWarning, match="compiled unshared"):
        torch.testing.assert_close(compiled(X), run(X))
    assert helpers.counted(lambda: compiled(X))[0] == 1


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("strict", [None, True])
def test_strict_backends_raise(strict: bool | None) -> None:
    compiled = torch.compile(helpers.Loop(_wrap), backend=fxparam.backend("eager", strict=strict))
    with pytest.raises(Exception, match="pass share failed on node .*KeyError: 'oops'"):
        compiled(X)


def test_the_environment_switches_sharing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_DISABLE", "1")
    backend = fxparam.backend("eager")
    compiled = torch.compile(helpers.Loop(_wrap), backend=backend)
    assert helpers.counted(lambda: compiled(X))[0] == 6
    assert backend.reports == []


def test_what_fails_in_the_inner_backend_is_not_ours() -> None:
    def inner(gm: Any, inputs: Any) -> Any:
        raise KeyError("theirs")

    backend = fxparam.backend(inner, strict=False)
    with pytest.raises(Exception, match="theirs") as caught:
        torch.compile(helpers.Loop(_wrap), backend=backend)(X)
    assert "fxparam's pass" not in str(caught.value)


def test_a_backend_is_printed_as_it_is_made() -> None:
    assert repr(fxparam.backend()) == "fxparam.backend('inductor')"
    made = fxparam.backend(
        "aot_eager", mode="default", max_bytes=8, strict=True, shape_padding=True
    )
    assert repr(made) == (
        "fxparam.backend('aot_eager', mode='default', shape_padding=True, strict=True, max_bytes=8)"
    )
