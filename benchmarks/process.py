"""A job in a fresh process, with caches of its own that start empty."""

from __future__ import annotations

import json
import os
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
        cold: whether the compilers' caches are disabled; if not, they are empty at the start.

    Returns:
        The result, or ``{"error": line}`` for a process that came to none.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, target = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(job))
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
