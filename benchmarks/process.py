"""A job in a fresh process, with caches of its own in which is nothing compiled of a program."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "run_job", "run_module"]

ROOT = Path(__file__).parents[1]


def run_module(module: str, job: dict[str, Any], limit: float, *, cold: bool) -> dict[str, Any]:
    """``python -m module JOB RESULT``, and what it wrote as RESULT.

    Args:
        limit: seconds after which the process is ended.
        cold: whether the compilers' caches are disabled; if not, they start without programs.

    Returns:
        The result, or ``{"error": line}`` for a process that came to none.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, target = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(job))
        shutil.copytree(_instructions().name, Path(folder) / "inductor")
        command = [sys.executable, "-m", module, str(given), str(target)]
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(folder, cold),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its compile workers end with it
        )
        try:
            _, said = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(child)
            return {"error": f"no result after {limit:.0f} s"}
        except BaseException:
            _end(child)
            raise
        if target.exists():
            result: dict[str, Any] = json.loads(target.read_text())
            return result
        return {"error": _reason(child.returncode, said)}


# What the processor can do, as Inductor finds out: by compiling, for each set of instructions, a
# program that uses it, and loading that in a process of its own.
_FIND_INSTRUCTIONS = "from torch._inductor.cpu_vec_isa import pick_vec_isa; pick_vec_isa()"


@functools.cache
def _instructions() -> tempfile.TemporaryDirectory[str]:
    """An Inductor cache with nothing but these programs, which take seconds where they are missing.

    No compile time counts them, for they come with a process's first use of the compiler. Where
    this fails, each process finds out for itself.
    """
    folder = tempfile.TemporaryDirectory(prefix="fxparam-bench-")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder.name}
    command = [sys.executable, "-c", _FIND_INSTRUCTIONS]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    return folder


def _reason(code: int, said: str) -> str:
    """Why a process came to no result; what one that a signal ended said last is not the reason."""
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"exit code {code}: {names.get(-code, 'a signal')}"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def run_job(job: dict[str, Any], limit: float) -> dict[str, Any]:
    """A job of ``benchmarks.worker``; only compile times want their caches disabled."""
    return run_module("benchmarks.worker", job, limit, cold=job["kind"] == "probe")


def _end(child: subprocess.Popen[str]) -> None:
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def _environment(folder: str, cold: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leaves torch's contestants their memory
        "PYTHONWARNINGS": "ignore",
    }
    if cold:
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    return environment
