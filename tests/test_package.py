"""What a user sees before running anything."""

from __future__ import annotations

import subprocess
import sys

import fxparam


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
