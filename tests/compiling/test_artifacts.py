"""Artifacts that torch loads in a later process are not kept apart by backend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fxparam
from fxparam.compiling import artifacts


@pytest.fixture(autouse=True)
def _not_yet_warned() -> Iterator[None]:
    artifacts._warn_once.cache_clear()
    torch.compiler.reset()
    yield
    artifacts._warn_once.cache_clear()


def _function(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _made(x: torch.Tensor) -> None:
    fxparam.backend("eager")


def _compiles(x: torch.Tensor) -> None:
    torch.compile(_function, backend=BACKEND)(x)


def _is_given(x: torch.Tensor) -> None:
    if torch.__version__ < "2.15":
        pytest.skip("this torch does not tell a backend that it was given")
    torch.compile(_function, backend=BACKEND)


BACKEND = fxparam.backend("eager")


@pytest.mark.parametrize("does", [_made, _compiles, _is_given])
def test_a_warning_once(
    does: Callable[[torch.Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.ones(2)
    with caplog.at_level(logging.WARNING, "fxparam"):
        does(x)
        assert not caplog.records
        with torch._dynamo.config.patch(caching_precompile=True):
            for _ in range(2):
                torch.compiler.reset()
                does(x)
    (record,) = caplog.records
    assert "TORCHINDUCTOR_CACHE_DIR" in record.getMessage()


PROGRAM = """
import sys, torch, fxparam
from tests import helpers
cell = torch.nn.Linear(4, 4)
fxparam.register_parametrization(cell, "weight", helpers.Counting())
def f(x):
    return cell(cell(x))
run = torch.compile(f, backend=sys.argv[1])
with torch.no_grad():
    run(torch.ones(1, 4))
    print(helpers.counted(lambda: run(torch.ones(1, 4)))[0])
torch.compiler.save_cache_artifacts()
"""


def test_torch_loads_what_another_backend_compiled(tmp_path: Path) -> None:
    """A second number of 1 means that torch tells backends apart: then the limit may go."""
    environment = {
        **os.environ,
        "TORCH_CACHING_PRECOMPILE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, backend],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for backend in ("inductor", "fxparam")
    ]
    assert [int(each.stdout) for each in done] == [2, 2]
    assert "caching_precompile is on" in done[1].stderr
