"""What a user sees before running anything."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fxparam

X = torch.ones(1, 4)


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_public_name_exists() -> None:
    assert all(hasattr(fxparam, name) for name in fxparam.__all__)


def test_the_backend_is_listed_without_importing_fxparam() -> None:
    code = (
        "import sys, torch; names = torch._dynamo.list_backends();"
        "print('fxparam' in names, 'fxparam' in sys.modules)"
    )
    assert _python(code) == "True False"


def test_importing_is_light() -> None:
    code = "import sys, fxparam; print('torch._inductor.compile_fx' in sys.modules)"
    assert _python(code) == "False"


class _Large(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(4, 4) for _ in range(200)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: fxparam.fold(m), "`program` must be of class ExportedProgram"),
        (lambda m: fxparam.hoist(m), "`gm` must be of class GraphModule"),
        (lambda m: fxparam.split(m), "`gm` must be of class GraphModule"),
        (
            lambda m: fxparam.split(torch.export.export(m, (X,))),
            "`gm` must be of class GraphModule",
        ),
        (
            lambda m: fxparam.symbolic_trace(m, example_inputs=X),
            "`example_inputs` must be of class Sequence",
        ),
        (lambda m: fxparam.compile(m, backend=m), "has a backend of its own: got backend=_Large"),
        (lambda m: fxparam.backend(max_bytes=m), "max_bytes must be a number of bytes: got _Large"),
    ],
)
def test_a_wrong_argument_is_named_and_not_printed(call: Any, says: str) -> None:
    with pytest.raises(TypeError, match=re.escape(says)) as caught:
        call(_Large())
    assert len(str(caught.value)) < 600
