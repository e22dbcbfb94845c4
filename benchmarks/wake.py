"""First uses, of compilers and of libraries: what they cost is no program's compile time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.programs import Setting

__all__ = ["wake", "wake_compiler"]


def wake(case: Case, contestant: Contestant, setting: Setting) -> None:
    """Use once, on next to nothing, what the contestant will use: libraries, then its compiler."""
    _wake_libraries(setting.device)
    if contestant.compiler == "jax":
        import jax

        step = jax.grad(lambda x: jax.numpy.linalg.solve(x, x @ x).sum())
        jax.block_until_ready(jax.jit(step)(jax.numpy.eye(2)))
    elif contestant.compiler is not None:
        wake_compiler(contestant.compiler, setting.device)
        if case.exported:
            _wake_packaging(setting.device)


def _wake_libraries(device: str) -> None:
    eye = torch.eye(2, device=device)
    eye @ eye
    torch.linalg.solve(eye, eye)
    nn.functional.conv1d(eye[None], eye[None])


def wake_compiler(backend: str | Callable[..., Any], device: str) -> None:
    """Train once: imports, the headers of generated code, and on a GPU the pool that compiles."""
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: torch.tanh(x), backend=backend)(x).sum().backward()
    if device == "cuda":
        from torch._inductor.async_compile import AsyncCompile

        wait = getattr(AsyncCompile, "wait_pool_ready", None)
        if wait is not None:
            wait()


def _wake_packaging(device: str) -> None:
    """AOTInductor's headers are kept for the whole machine: the first program would pay for all."""
    x = torch.ones(8, device=device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(nn.Tanh(), (x,), strict=False)
        path = str(Path(folder) / "wake.pt2")
        package = torch._inductor.aoti_compile_and_package(program, package_path=path)
        torch._inductor.aoti_load_package(package)(x)
